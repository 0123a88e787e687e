"""Who decides whether an open answer is right: an endpoint, a local language model, or an exact match."""
