"""Checkpoints on disk: opening those that T5X and Orbax wrote, and the layouts that fusectl writes.

    locate.py    which directory is meant        format.py    what a format answers for itself
    opening.py   opening it, whatever it is      registry.py  the formats by name
    t5x.py       msgpack index + zarr v2         orbax.py     JSON index + zarr, in an OCDBT database or not
    flaxpack.py  msgpack trees, in both          foreign.py   what other libraries wrote
    tree.py      keys, leaves, Checkpoint        record.py    fusectl.json
    zarr.py      what array metadata says        encoding.py  the bytes of a chunk
    store.py     reading files and objects       target.py    writing them
    sink.py      a checkpoint being written      staging.py, upload.py  until it appears, in a directory or a bucket

To add a format, write a subclass of Format in a module here that lists it in its `FORMATS`, as t5x.py does, and name
it with that module in kinds.FormatName.
"""
