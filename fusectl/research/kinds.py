"""Closed sets about research. Importing them costs nothing: options are made from them."""

from __future__ import annotations

from enum import StrEnum


class Experiment(StrEnum):
    """The experiments of the papers that can be run at a small size."""

    TABLE1 = "table1"
    TABLE2 = "table2"
    TABLE4 = "table4"
    FIGURE4 = "figure4"
    FIGURE5 = "figure5"
    FIGURE6 = "figure6"
    STARTS = "starts"
    FINETUNE = "finetune"
    LIGO = "ligo"


class PresetName(StrEnum):
    """How large experiments are: for a minute, for two cores, for a GPU."""

    SMOKE = "smoke"
    CPU = "cpu"
    GPU = "gpu"
