"""Records in, things to look at out."""
