"""How the parts of a model learn: stages, collator, schedule, trainers and recipes."""
