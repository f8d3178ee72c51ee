"""Training monitoring and weight-drift dashboard for PyTorch."""
