"""For tests of one's own families and operations: what a plan says, computed in memory by code apart from the executor.

evaluate.py     the values of a Layout, and of all of a Plan's
"""
