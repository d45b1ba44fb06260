"""Publishing on the Hugging Face Hub: which files, with which card, in one commit."""
