"""Bytes on disk: reading, naming and writing checkpoints; knows no mathematics."""
