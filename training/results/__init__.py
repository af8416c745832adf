"""What a run reports while it trains, and the files that it writes."""
