"""Names of files in checkpoints and datasets that one room writes and another reads."""

SOURCES_FILE = "minigpt4_sources.json"  # by `convert`: where every tensor came from
WEIGHTS_FILE = "minigpt4_weights.json"  # by `convert`, `merge` and the demo: values of every tensor, for `verify`
RUN_FILE = "run.json"  # by training and curation: what was done
RESULTS_FILE = "results.json"  # by `evaluate`: metrics and their settings
