"""Measuring what an adapter does to the weights: angles, norms, and a report on an adapter folder."""
