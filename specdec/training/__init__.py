"""Drafters that are trained: text of the target's own, recipes, and the loop that fits them."""
