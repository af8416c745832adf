"""What algorithms stand on: events, contracts and their order, the registry, draws, and helpers for batches."""
