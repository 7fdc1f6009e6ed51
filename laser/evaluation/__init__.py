"""Text in, numbers out: how good a model is, with its error bar."""
