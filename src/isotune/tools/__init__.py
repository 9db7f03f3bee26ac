"""Public functions on adapted models, in addition to PEFT's own."""
