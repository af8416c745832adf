"""What keeps a run from harm: another run in its folder, values that are no numbers, the end of its machine's lease."""
