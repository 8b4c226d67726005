"""What a trainer has to be told to go on with a checkpoint: T5X's gin bindings, and Flaxformer's macros.

The sizes are those of the tree itself. What no tree tells (dropout, the dtype of activations, the schedule) stays as it
was. Source: t5x/examples/{t5,scalable_t5}/network.py for the config, t5x/utils.py for the restore.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusectl.archs import Recognized, recognize
from fusectl.builder import LARGEST_STEP
from fusectl.errors import UsageError
from fusectl.formats import open_checkpoint
from fusectl.formats.tree import Checkpoint
from fusectl.transforms.optimizer import STATE


TRAINERS = ("t5x",)
_HEAD = "decoder/logits_dense/kernel"


@dataclass(frozen=True)
class Restart:
    """The bindings for a checkpoint."""

    path: str
    # The lines that import what is bound, and what network.Transformer is to be, where that changes.
    imports: tuple[str, ...]
    # The network's config class, and its fields.
    config: str
    network: Mapping[str, Any]
    restore: Mapping[str, Any]
    # Of the learning rate's schedule.
    schedule: Mapping[str, Any]
    # The sizes by the names of Flaxformer's macros.
    macros: Mapping[str, Any]
    notes: tuple[str, ...]

    def gin(self) -> str:
        """The text of a gin file, to be included after the one that the small model was trained with."""
        return "\n".join(self._lines()) + "\n"

    def as_json(self) -> Mapping[str, Any]:
        """The bindings as JSON, and the text."""
        return {
            "path": self.path,
            "config": self.config,
            "network": {name: getattr(value, "name", value) for name, value in self.network.items()},
            "restore": dict(self.restore),
            "schedule": dict(self.schedule),
            "flaxformer": dict(self.macros),
            "notes": list(self.notes),
            "gin": self.gin(),
        }

    def _lines(self) -> Iterator[str]:
        yield f"# {self.path}"
        yield from (f"# {note}" for note in self.notes)
        yield "from __gin__ import dynamic_registration"
        yield from self.imports
        yield f"INITIAL_CHECKPOINT_PATH = {self.path!r}"
        yield f"{self.config}:"
        yield from (f"  {name} = {_value(value)}" for name, value in self.network.items())
        if self.restore:
            yield "utils.RestoreCheckpointConfig:"
            yield from (f"  {name} = {_value(value)}" for name, value in self.restore.items())
        if self.schedule:
            yield "utils.create_learning_rate_scheduler:"
            yield from (f"  {name} = {_value(value)}" for name, value in self.schedule.items())
        yield "# Flaxformer has macros for the sizes:"
        yield from (f"# {name} = {_value(value)}" for name, value in self.macros.items())


def restart(path: str, arch: str | None = None, *, lr_offset: int = 0) -> Restart:
    """The Restart of a checkpoint.

    With `lr_offset` the schedule goes on as if so many more steps had been made; fewer if it is negative, which holds
    the maximal rate for longer (Deep Fusion, section 5.4). Raises Incompatible for a tree of no known family, and
    UsageError for an offset that leads to before the schedule's first step.
    """
    checkpoint = open_checkpoint(path)
    return restart_of(checkpoint, recognize(checkpoint.shapes, checkpoint.path, arch), lr_offset=lr_offset)


def restart_of(checkpoint: Checkpoint, tree: Recognized, *, lr_offset: int = 0) -> Restart:
    """The Restart of an opened checkpoint of one of T5's families."""
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
    if not any(name.startswith(STATE) for name in checkpoint.leaves):
        notes.append("without optimizer state: T5X begins a new one, which needs a warm-up")
        imports.append("from t5x import utils")
        restore = {"fallback_to_scratch": True, "assignment_map": (("state/param_states.*", None),)}
    if record is not None and record.optimizer in {"reset", "asymmetric"}:
        notes.append("optimizer state that starts from zeros, in part at least: its first updates need a warm-up")
    if record is not None and record.self_fused:
        notes.append("learning rates as before move it faster: fusectl self-fuse --lr-table says by how much")
    if checkpoint.step is not None and not lr_offset:
        notes.append(f"step {checkpoint.step:,}: schedules such as rsqrt_decay go on from there")
    if lr_offset:
        notes.append(_offset_in_words(checkpoint, lr_offset))
        imports = [*dict.fromkeys([*imports, "from t5x import utils"])]
    # T5X takes its offset off.
    schedule = {"step_offset": -lr_offset} if lr_offset else {}
    return Restart(checkpoint.path, tuple(imports), config, network, restore, schedule, macros, tuple(notes))


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
