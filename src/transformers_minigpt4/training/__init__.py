"""Training: stages, collator, schedule, trainers and recipes."""
