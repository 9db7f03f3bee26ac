"""The run-time form of an adapter: an operator placed on a host. It depends on torch, `algebra` and `subspace`."""
