"""What progressive resizing takes its sizes from: stages of epochs, or a draw for each step."""
