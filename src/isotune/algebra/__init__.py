"""Maps from trainable parameters to operators: plain torch, no modules, no PEFT."""
