"""Programs that serve a model: an OpenAI-compatible server and a web page for chats."""
