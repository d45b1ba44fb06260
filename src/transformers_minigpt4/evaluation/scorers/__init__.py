"""Scorers without a model: they turn answers and references into numbers as the official scripts do."""
