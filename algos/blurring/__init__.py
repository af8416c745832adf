"""The blur of BlurPool: its filters, derivatives and GPU kernel."""
