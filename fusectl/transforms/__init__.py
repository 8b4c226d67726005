"""Pure functions from families and shapes to Layouts: no arrays, no paths, no progress."""
