"""Checkpoints as sources: recognised, complete, and seen otherwise (queries, keys and values apart; layers scanned or
not).
"""
