"""Trained drafters that come with the toolkit: a folder each, with a card on how it was made."""
