"""What goes in and comes out: processor, chat templates and pipeline, which also travel to the Hub as remote code."""
