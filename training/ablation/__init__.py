"""Which speed-ups pay on one's own data: runs with each left out, each alone, all and none, compared over seeds."""
