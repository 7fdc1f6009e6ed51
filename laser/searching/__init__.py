"""Trying edits by the model's loss: what is tried, how, and what is kept. Its result is a plan."""
