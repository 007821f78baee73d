"""Methods that choose zeros."""
