"""An optimizer's state: which slots there are, and what becomes of them in a grown model.

    state.py      what every optimizer answers      adam.py, adafactor.py   those that can be carried
    registry.py   which there are, and find_state   unknown.py, trees.py    those that can be reset; optax's trees
    carry.py      what fusing makes of slots        depth.py                what more layers make of them
    rates.py      learning rates afterwards         kinds.py                what may become of a state

To add an optimizer, write a subclass of OptimizerState in a file here, as adam.py does, and name it in registry.py.
What its moments average (`orders`) decides how they are carried, deepened, restacked and verified.
"""
