"""Models whose features are known."""
