"""Captions for many images: where they come from, where the captions go, and runs over many processes and machines."""
