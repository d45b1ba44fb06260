"""Builds a stage-2 dataset: captions that are generated, repaired, filtered and reviewed by people."""
