"""Carrying out a plan: bytes move here, and nowhere else.

carrying_out.py  staging, the last checks, one rename     journal.py, finished.py  resuming
execute.py       chunk by chunk, on threads               unit.py                  a tile and its chunks' values
evaluators.py    what each kind of summand is             measure.py               deviations and means, before
work.py          what all of them need                    axis_matrices.py         matrices of growth operators
"""
