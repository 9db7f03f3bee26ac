"""The run-time form of an adapter: an operator placed on a host. It knows torch, `algebra` and `subspace`."""
