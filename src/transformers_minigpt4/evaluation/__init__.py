"""Measures models: tasks with a common interface, the runner, results and their comparison."""
