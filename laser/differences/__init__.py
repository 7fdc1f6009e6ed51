"""Two checkpoints compared: what a fine-tune did to its base, and how far that can be undone."""
