"""Families as Flax networks that run in stages, what they are run on, and their training. Imports JAX."""
