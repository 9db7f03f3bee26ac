"""What an adapter does to the weights: angles, norms and a report of an adapter folder."""
