"""What a fine-tuning needs: memory and time of a step, from the model's configuration alone."""
