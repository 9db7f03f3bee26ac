"""Recipes and the loop that trains and scores them; nothing in the library imports this package."""
