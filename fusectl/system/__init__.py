"""The machine: threads in a byte budget, memory, least-recently-used caches, text and files made safe. Nothing here
knows of checkpoints.
"""
