"""Adapters as single safetensors files without a configuration, the form in which diffusion tools exchange them."""
