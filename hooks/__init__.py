"""The training side: what attaches to PyTorch and fills the log. Imports monitor, never dashboard."""
