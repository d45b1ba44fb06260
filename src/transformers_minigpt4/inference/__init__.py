"""Loading models for inference, batched and streamed answers, and captions of many images."""
