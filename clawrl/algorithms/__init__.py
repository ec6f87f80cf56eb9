"""Algorithms: pure functions from judgements and scores to token-level targets, and from those to a loss."""
