"""Public functions on adapted models, beside what PEFT offers itself."""
