"""LiGO: a linear growth operator, learned in some hundred steps and applied by streaming (ICLR 2023).

network.py    the grown model as a function of its matrices, in JAX, and its loss
learn.py      learning them

sources/operator.py has the matrices: how they start, and the checkpoint that they are kept in. sources/lesson.py says
what they are learned from, and how, with the defaults.
"""
