"""Checkpoint surgery for T5X and Orbax: fuse trained models into a wider one, stream it, prove it.

The library's verbs, imported on first use so that the command line starts at once:

    open_checkpoint                   formats/
    Options                           planning/options.py
    plan_fusion                       operations/fuse.py
    plan_noise_fill                   operations/noise_fill.py
    plan_conversion                   operations/convert.py
    carry_out                         writing/carrying_out.py
    verify                            verification/
"""

from __future__ import annotations

from typing import Any


__version__ = "0.1.0"

_VERBS = {
    "Options": "fusectl.planning.options",
    "carry_out": "fusectl.writing.carrying_out",
    "plan_conversion": "fusectl.operations.convert",
    "plan_fusion": "fusectl.operations.fuse",
    "plan_noise_fill": "fusectl.operations.noise_fill",
    "open_checkpoint": "fusectl.formats",
    "verify": "fusectl.verification",
}

__all__ = ["__version__", *_VERBS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'fusectl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_VERBS[name]), name)
