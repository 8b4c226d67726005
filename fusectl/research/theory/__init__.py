"""Deep Fusion's theory (section 4) as instruments: what growth does to training, measured on one's own models.

field.py      any two losses: their fields, the Lie bracket, the modified field and its flow, two real steps
space.py      a fusion's parameters in the paper's coordinates, and both losses on them
symmetry.py   how far copies are from being exchangeable, which is what a fusion has to lose
fusion.py     all of it for checkpoints and a batch
"""
