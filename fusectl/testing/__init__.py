"""For tests of one's own families, operations and formats: contracts to subclass, and a plan's values in memory.

class TestMine(FamilyTests):
    families = (MINE,)

contracts.py    FamilyTests, FormatTests, OperationTests: what holds for every row, run by pytest
evaluate.py     the values of a Layout, and of all of a Plan's, by code apart from the executor
"""
