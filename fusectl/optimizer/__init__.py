"""An optimizer's state: which slots there are, and what becomes of them in a grown model."""
