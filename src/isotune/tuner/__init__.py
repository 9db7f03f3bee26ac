"""What PEFT calls at run time: the tuner layer, the tuner model and their registration."""
