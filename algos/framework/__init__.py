"""The base of all algorithms: events, contracts and their order, the registry, draws, and helpers for batches."""
