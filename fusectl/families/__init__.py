"""Model families as tables: which axis of which tensor is what. And the recognition of a checkpoint's family.

A family is a tuple of rows, one per kind of tensor, and nothing else that surgery needs to know: the fusion rule, the
noise, the optimizer's slots and the sizes follow from the axes' names.

    table.py        Row, Family                       registry.py     those that fusectl brings along
    settings.py     what no tree tells of a network   recognition.py  which one a tree is of
    userfile.py     a family as a TOML table          recognized.py   a tree with its rows and sizes

To add a family, imitate t5.py and name it in `registry.FAMILIES`; the tests run over that tuple.
"""
