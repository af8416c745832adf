"""A run's state on disk: in one file, in shards, in DeepSpeed's files, or exported."""
