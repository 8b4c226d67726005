"""One file per operation: sources and options to a Plan.

fuse.py, noise_fill.py, convert.py, stack.py, ligo.py      the planners
one_source.py                                              what those on one checkpoint have in common
equalize.py                                                measuring residual streams, for fuse
learning/                                                  learning an operator, for ligo; imports JAX
"""
