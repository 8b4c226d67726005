"""Where each tensor of a grown model comes from: fusion, depth, linear operators. Each makes Layouts of a family's
axes.
"""
