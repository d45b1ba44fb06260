"""Rows for training, and the sources that they come from."""
