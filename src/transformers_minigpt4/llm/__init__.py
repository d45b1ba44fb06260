"""One client for text language models, at an endpoint or local, with a budget, a cache and plain errors."""
