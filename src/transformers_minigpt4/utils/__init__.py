"""Helpers that know nothing of the rest of the package: files, locks, versions, text."""
