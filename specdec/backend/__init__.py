"""A HuggingFace model that scores trees: cache, masks, one pass. No drafting, no acceptance."""
