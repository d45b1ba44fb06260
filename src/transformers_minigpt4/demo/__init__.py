"""The toy world of colored shapes on which `minigpt4 demo` trains and shows the two stages."""
