"""LiGO: a linear growth operator, learned in some hundred steps and applied by streaming (ICLR 2023).

operator.py   its matrices: how they start, and the checkpoint that they are kept in
network.py    the grown model as a function of them, in JAX, and its loss
lesson.py     what they are learned from, and how, with the defaults
learn.py      learning them
"""
