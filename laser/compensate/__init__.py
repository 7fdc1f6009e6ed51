"""What a smaller copy of a model lost, given back by an adapter of low rank."""
