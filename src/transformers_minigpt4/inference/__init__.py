"""Inference with any image-text-to-text model: loading, batched answers, streaming, and captions of many images."""
