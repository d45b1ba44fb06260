"""What the network is: configuration and model classes, which also travel to the Hub as remote code."""
