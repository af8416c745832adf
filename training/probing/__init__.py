"""What is known about a run before it starts: its time and cost, and a learning rate that suits it."""
