"""Adapters as single safetensors files without a configuration, as diffusion tools exchange them."""
