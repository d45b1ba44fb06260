"""How good a model is: tasks, one contract for them, the runner, results and their comparison."""
