"""T5X's gin bindings, and Flaxformer's macros.

Source: t5x/examples/{t5,scalable_t5}/network.py for the config, t5x/utils.py for the restore.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusectl.archs import Recognized
from fusectl.builder import LARGEST_STEP
from fusectl.errors import UsageError
from fusectl.formats.tree import Checkpoint
from fusectl.restart.base import Restart, notes_on_history
from fusectl.transforms.optimizer import is_state


_HEAD = "decoder/logits_dense/kernel"


def restart_of(checkpoint: Checkpoint, tree: Recognized, lr_offset: int) -> Restart:
    """The gin file, to be included after the one that the small model was trained with.

    `lr_offset` is the number of steps by which the schedule is to be ahead of the step; raises UsageError for one that
    leads to before its first step.
    """
    sizes, record = tree.sizes, checkpoint.record
    scalable = "kv" in sizes
    network: dict[str, Any] = {
        "vocab_size": sizes["vocab"],
        "emb_dim": sizes["embed"],
        "num_heads": sizes["heads"],
        "head_dim": sizes["kv"] if scalable else sizes["joined_kv"] // sizes["heads"],
        "mlp_dim": sizes["mlp"],
        "num_encoder_layers": tree.depths["encoder"],
        "num_decoder_layers": tree.depths["decoder"],
        "logits_via_embedding": _HEAD not in tree.shapes,
    }
    macros = {
        "NUM_EMBEDDINGS": network["vocab_size"],
        "EMBED_DIM": network["emb_dim"],
        "NUM_HEADS": network["num_heads"],
        "HEAD_DIM": network["head_dim"],
        "MLP_DIM": network["mlp_dim"],
        "NUM_ENCODER_LAYERS": network["num_encoder_layers"],
        "NUM_DECODER_LAYERS": network["num_decoder_layers"],
    }
    if scalable:
        network["scan_layers"] = tree.scanned
    notes = ["to be included after the gin file of the small model; what is not bound here stays as it was there"]
    imports, config = [f"from t5x.examples.{'scalable_t5' if scalable else 't5'} import network"], "network.T5Config"
    if record is not None and record.norm == "property":
        notes.append("a norm per source: the network is fusectl's, and its config starts anew, as T5 has it")
        config = "network.ScalableT5Config" if scalable else "network.T5Config"
        imports = [
            "from t5x import models",
            "from fusectl.archs import t5_flax as network",
            "models.EncoderDecoderModel.module = @network.Transformer()",
            f"network.Transformer.config = @{config}()",
        ]
        gated = any(name.endswith("mlp/wi_0/kernel") for name in tree.shapes)
        network |= {
            "norm_groups": tuple(record.norm_groups),
            "mlp_activations": ("gelu", "linear") if gated else ("relu",),
            "dtype": "bfloat16",
            "dropout_rate": _Macro("DROPOUT_RATE"),
        }
    restore: dict[str, Any] = {}
    if not any(map(is_state, checkpoint.leaves)):
        notes.append("without optimizer state: T5X begins a new one, which needs a warm-up")
        imports.append("from t5x import utils")
        restore = {"fallback_to_scratch": True, "assignment_map": (("state/param_states.*", None),)}
    notes += notes_on_history(record)
    if checkpoint.step is not None and not lr_offset:
        notes.append(f"step {checkpoint.step:,}: schedules such as rsqrt_decay go on from there")
    if lr_offset:
        notes.append(_offset_in_words(checkpoint, lr_offset))
        imports = [*dict.fromkeys([*imports, "from t5x import utils"])]
    # T5X takes its offset off.
    schedule = {"step_offset": -lr_offset} if lr_offset else {}
    values = {
        "config": config,
        "network": {name: getattr(value, "name", value) for name, value in network.items()},
        "restore": restore,
        "schedule": schedule,
        "flaxformer": macros,
    }
    bound = {config: network, "utils.RestoreCheckpointConfig": restore}
    bound["utils.create_learning_rate_scheduler"] = schedule
    lines = tuple(_lines(checkpoint.path, imports, bound, macros))
    return Restart("t5x", checkpoint.path, tuple(notes), lines, values)


def _lines(
    path: str, imports: Sequence[str], bound: Mapping[str, Mapping[str, Any]], macros: Mapping[str, Any]
) -> Iterator[str]:
    """The lines of gin: what they import, and per configurable the values of its parameters."""
    yield "from __gin__ import dynamic_registration"
    yield from imports
    yield f"INITIAL_CHECKPOINT_PATH = {path!r}"
    for configurable, values in bound.items():
        if values:
            yield f"{configurable}:"
            yield from (f"  {name} = {_value(value)}" for name, value in values.items())
    yield "# Flaxformer has macros for the sizes:"
    yield from (f"# {name} = {_value(value)}" for name, value in macros.items())


def _offset_in_words(checkpoint: Checkpoint, lr_offset: int) -> str:
    """What an offset of the schedule does to T5X's rsqrt_decay, 1 / sqrt(max(step - step_offset, warmup_steps))."""
    step = checkpoint.step or 0
    then = step + lr_offset
    if then > LARGEST_STEP:
        raise UsageError(f"--lr-offset {lr_offset}: trainers keep steps in an int32")
    if then < 0:
        raise UsageError(
            f"{checkpoint.path}: --lr-offset {lr_offset}, and the step is {step:,}: before the schedule begins",
            hint=f"--lr-offset {-step} or more" if step else "without an offset; --step sets the step",
        )
    if then == 0 or step == 0:
        return f"step {step:,}, and the schedule goes on at step {then:,} of its own"
    change = math.sqrt(step / then)
    longer = "; better in the end, worse at first, may become unstable" if lr_offset < 0 else ""
    rate = f"rsqrt_decay gives {change:.3g} times the rate{longer}"
    return f"step {step:,}, and the schedule goes on at step {then:,} of its own: {rate}"


@dataclass(frozen=True, slots=True)
class _Macro:
    """The value of a macro of gin, by its name."""

    name: str


def _value(value: object) -> str:
    return f"%{value.name}" if isinstance(value, _Macro) else repr(value)
