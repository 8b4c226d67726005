"""Integers and names: which axes a tensor has, and of which blocks it consists. No arrays, no paths."""
