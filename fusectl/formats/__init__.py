"""Checkpoints on disk: opening those that T5X and Orbax wrote, and the layouts that fusectl writes.

locate.py   which directory is meant           tree.py      keys, leaves, Checkpoint
t5x.py      msgpack index + zarr v2            zarr.py      what array metadata says
orbax.py    JSON index + zarr, OCDBT or not    encoding.py  the bytes of a chunk
flaxpack.py msgpack trees, in both             store.py     files through tensorstore and the operating system
foreign.py  what other libraries wrote         target.py    new files: directories, or an OCDBT database
sink.py     writing: staging, arrays, commit       registry.py  the formats by name, open_checkpoint
"""
