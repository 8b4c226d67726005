"""One file per operation: sources and options to a Plan. Its row is in fusectl.verbs, its proof in verification/.

    fuse.py, noise_fill.py, convert.py, stack.py, ligo.py      the planners
    one_source.py                                              what those on one checkpoint have in common
    routes.py, target.py                                       which of them leads to larger sizes, and to which
    equalize.py                                                measuring residual streams, for fuse
    learning/                                                  learning an operator, for ligo; imports JAX

To add one, write a planner here as stack.py does, with a function `route` if it grows a model; a module in
verification/ that is called like the kind of its record, as stacked.py is; and in verbs.py that kind and a row.
"""
