"""Training with DeepSpeed: what evaluation needs and no published checkpoint gives."""
