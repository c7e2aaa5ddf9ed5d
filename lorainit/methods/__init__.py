"""The initializations."""
