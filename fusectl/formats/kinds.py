"""Closed sets about the layout on disk. Importing them costs nothing: options are made from them."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class FormatName(StrEnum):
    """The formats by the names of --format, each with the module here that has it.

    ORBAX is a choice among the Orbax layouts, by the family's trainer.
    """

    module: str

    def __new__(cls, name: str, module: str = "") -> Self:
        found = str.__new__(cls, name)
        found._value_, found.module = name, module
        return found

    T5X = "t5x", "t5x"
    ORBAX = "orbax"
    ORBAX_OCDBT_ZARR3 = "orbax-ocdbt-zarr3", "orbax"
    ORBAX_OCDBT_ZARR2 = "orbax-ocdbt-zarr2", "orbax"
    ORBAX_ZARR2 = "orbax-zarr2", "orbax"
    ORBAX_ZARR3 = "orbax-zarr3", "orbax"


class Codec(StrEnum):
    """How chunks are compressed; AUTO keeps what the sources have wherever their chunks can be passed through."""

    AUTO = "auto"
    ZSTD = "zstd"
    NONE = "none"


class Dtype(StrEnum):
    """The dtypes that parameters may be cast to."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
