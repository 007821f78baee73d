"""Methods that put a matrix, or a part of it, into factors of low rank."""
