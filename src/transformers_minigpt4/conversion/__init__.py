"""Released weights and base checkpoints into MiniGPT-4 checkpoints, and their verification."""
