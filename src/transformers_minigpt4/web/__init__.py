"""Local web pages: a Gradio server that stays on this machine, and the HTML it shows."""
