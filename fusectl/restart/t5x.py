"""T5X's gin bindings, and Flaxformer's macros: a file to be the last that T5X is given.

Sources: t5x/examples/{t5,scalable_t5}/network.py for the config; t5x/{train,utils,checkpoints,checkpoints_utils}.py for
the restore, which looks into MODEL_DIR first; t5x/configs/runs/*.gin for what a run binds of it: pretrain.gin nothing,
finetune.gin the macro INITIAL_CHECKPOINT_PATH, eval.gin and infer.gin CHECKPOINT_PATH, others `restore = None`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusectl.errors import Incompatible, UsageError
from fusectl.families.kinds import Norm, Trainer
from fusectl.families.recognized import Recognized
from fusectl.formats.names import T5X_STEP
from fusectl.formats.registry import format_named
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import np_dtype
from fusectl.optimizer.state import is_state
from fusectl.planning.options import LARGEST_STEP
from fusectl.restart.base import Restart, not_read, notes_on_history, notes_on_lineage, require_read
from fusectl.restart.ginfile import GinFiles, literal, read_gin


_HEAD, _GATE = "decoder/logits_dense/kernel", re.compile(r"mlp/wi_0/kernel$")
_PLACE = "a gin file of its own, the last --gin_file"
_CONFIG = "network.T5Config"
# The settings of a config that no tree tells, with T5X's defaults.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "t5": {
        "dtype": "float32",
        "mlp_activations": ("relu",),
        "dropout_rate": 0.1,
        "float32_attention_logits": False,
    },
    "scalable_t5": {
        "dtype": "float32",
        "mlp_activations": ("relu",),
        "dropout_rate": 0.1,
        "remat_policy": "none",
        "param_scan_axis": 1,
    },
}
# What widening leaves as it is, so that the small model's gin file has it, too.
_KEPT = ("vocab_size", "head_dim", "logits_via_embedding")
# The item that T5X looks for in what Orbax wrote, and what the names of parameters begin with.
_ITEM, _PREFIX = "state", "target/"


def restart_of(checkpoint: Checkpoint, tree: Recognized, lr_offset: int, gin: Sequence[str] = ()) -> Restart:
    """The gin file, to be the last that T5X is given.

    `lr_offset` is the number of steps by which the schedule is to be ahead of the step; `gin` are the files of the
    small model, whose settings are repeated for a norm per source. Raises NotRead for what T5X does not restore,
    Incompatible for gin files of another model, UsageError for an offset that leads to before the first step.
    """
    _require_restored(checkpoint, tree)
    network, groups, files = _sizes(tree), _norm_groups(checkpoint), read_gin(gin) if gin else None
    if files is not None:
        _require_fit(files, network, tree)
    settings = _repeated(files, tree) if files is not None and groups else {}
    restore, macros = _restore(checkpoint, tree), _macros(network)
    network |= settings
    schedule = {"step_offset": -lr_offset} if lr_offset else {}
    bound = {
        # Some runs bind None to it.
        "utils.CheckpointConfig": {"restore": _Gin("@utils.RestoreCheckpointConfig()")},
        "utils.RestoreCheckpointConfig": restore,
        _CONFIG: network,
        **(_grouped(groups) if groups else {}),
        # T5X takes its offset off.
        "utils.create_learning_rate_scheduler": schedule,
    }
    notes = (
        f"{_PLACE}: after the small model's and the run's, such as pretrain.gin or finetune.gin",
        "what is not bound here stays as it was there",
        *(_notes_on_settings(files, network, tree) if groups else _note_on_unused(files)),
        *_notes_on_restore(restore),
        *notes_on_history(checkpoint.record),
        *notes_on_lineage(checkpoint.record),
        *_note_on_schedule(checkpoint, lr_offset),
    )
    values = {
        "config": _CONFIG,
        "network": {**_plain(network), **({"norm_groups": groups} if groups else {})},
        "restore": {**_plain(restore), "path": checkpoint.path},
        "schedule": schedule,
        "flaxformer": macros,
    }
    lines = tuple(_lines(checkpoint.path, _imports(tree, groups, files, settings), bound, macros))
    return Restart(Trainer.T5X, checkpoint.path, notes, lines, values, f" this, in {_PLACE}", _renamed(checkpoint))


def _require_restored(checkpoint: Checkpoint, tree: Recognized) -> None:
    require_read(checkpoint, Trainer.T5X)
    item = checkpoint.location.item
    if format_named(checkpoint.format).keeps_tree and item != _ITEM:
        raise not_read(checkpoint, Trainer.T5X, f"a tree that is not the item {_ITEM!r} of a step", "t5x")
    if tree.naming.prefix != _PREFIX:
        raise not_read(checkpoint, Trainer.T5X, f"parameters that do not begin with {_PREFIX!r}", "t5x")


def _renamed(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What to do about a directory whose name T5X does not take for that of a checkpoint."""
    if T5X_STEP.fullmatch(checkpoint.location.home.name):
        return ()
    # T5X lists what is called checkpoint_N and takes nothing else for a checkpoint, whatever is in it.
    name = f"checkpoint_{checkpoint.step or 0}"
    return (
        f"T5X restores only from directories named checkpoint_STEP: move it to a new one as {name}, and change path",
    )


def _sizes(tree: Recognized) -> dict[str, Any]:
    """The fields of T5X's config that the tree tells."""
    sizes = tree.sizes
    network: dict[str, Any] = {
        "vocab_size": sizes["vocab"],
        "emb_dim": sizes["embed"],
        "num_heads": sizes["heads"],
        "head_dim": sizes["kv"] if "kv" in sizes else sizes["joined_kv"] // sizes["heads"],
        "mlp_dim": sizes["mlp"],
        "num_encoder_layers": tree.depths["encoder"],
        "num_decoder_layers": tree.depths["decoder"],
        "logits_via_embedding": _HEAD not in tree.shapes,
    }
    return {**network, "scan_layers": tree.scanned} if "kv" in sizes else network


def _macros(network: Mapping[str, Any]) -> dict[str, int]:
    """Flaxformer's names for the sizes."""
    return {
        "NUM_EMBEDDINGS": network["vocab_size"],
        "EMBED_DIM": network["emb_dim"],
        "NUM_HEADS": network["num_heads"],
        "HEAD_DIM": network["head_dim"],
        "MLP_DIM": network["mlp_dim"],
        "NUM_ENCODER_LAYERS": network["num_encoder_layers"],
        "NUM_DECODER_LAYERS": network["num_decoder_layers"],
    }


def _norm_groups(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The widths that each have a norm of their own; none for one norm over all of them."""
    record = checkpoint.record
    return tuple(record.norm_groups) if record is not None and record.norm == Norm.PROPERTY else ()


def _grouped(groups: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The bindings that put fusectl's network in the place of T5X's, its config made of T5X's."""
    return {
        "models.EncoderDecoderModel": {"module": _Gin("@t5_flax.Transformer()")},
        "t5_flax.Transformer": {"config": _Gin("@t5_flax.with_norm_groups()")},
        "t5_flax.with_norm_groups": {"config": _Gin(f"@{_CONFIG}()"), "norm_groups": groups},
    }


def _imports(
    tree: Recognized, groups: tuple[int, ...], files: GinFiles | None, settings: Mapping[str, _Gin]
) -> Iterator[str]:
    yield "from t5x import utils"
    yield f"from t5x.examples.{_example(tree)} import network"
    if groups:
        yield "from t5x import models"
        yield "from fusectl.networks import t5_flax"
    if files is not None:
        yield from (line for value in settings.values() for line in files.imports_for(value.text))


def _example(tree: Recognized) -> str:
    """Which of T5X's examples has the network."""
    return "scalable_t5" if "kv" in tree.sizes else "t5"


def _restore(checkpoint: Checkpoint, tree: Recognized) -> dict[str, Any]:
    """The parameters of T5X's RestoreCheckpointConfig."""
    # pretrain.gin leaves the path empty, and the macro alone is accepted and used by nobody: T5X then built the wide
    # network and trained it from scratch, with exit code 0. A path without the mode fails, since the run's own is
    # "latest".
    restore: dict[str, Any] = {"path": _Gin("%INITIAL_CHECKPOINT_PATH"), "mode": "specific"}
    dtypes = {checkpoint.leaves[tree.full(name)].dtype for name in tree.shapes}
    if any(np_dtype(dtype).itemsize < 4 for dtype in dtypes):
        # T5X restores parameters in the dtype that they are stored in, unless it is told another one.
        restore["dtype"] = "float32"
    if not any(map(is_state, checkpoint.leaves)):
        # Without these T5X refuses a tree that has no param_states where it is going to train.
        restore |= {"fallback_to_scratch": True, "assignment_map": (("state/param_states.*", None),)}
    return restore


def _notes_on_restore(restore: Mapping[str, Any]) -> Iterator[str]:
    if "assignment_map" in restore:
        yield "MODEL_DIR: empty at first, without this checkpoint, too: from there T5X restores whole states only"
        yield "without optimizer state: T5X begins a new one, which needs a warm-up"
        yield "eval.gin and infer.gin need none: for them without fallback_to_scratch and assignment_map"
    else:
        yield "MODEL_DIR: empty at first, or with this checkpoint as its newest; T5X looks there before any path"
    if "dtype" in restore:
        yield "parameters are stored in less than float32: restored in it, as T5X trains them"


def _require_fit(files: GinFiles, network: Mapping[str, Any], tree: Recognized) -> None:
    """Raises Incompatible where gin files are of another model than a fusion's source."""
    found = {name: literal(value) for name, value in files.config().items()}
    wrong = [
        f"{name}: {found[name]} in {files.where}, {network[name]} in the checkpoint"
        for name in _KEPT
        if isinstance(found.get(name), int) and found[name] != network[name]
    ]
    activations, kernels = found.get("mlp_activations"), 1 + any(map(_GATE.search, tree.shapes))
    if isinstance(activations, list | tuple) and len(activations) != kernels:
        wrong.append(f"mlp_activations: {activations} in {files.where}, {kernels} in the checkpoint")
    if wrong:
        raise Incompatible(f"{files.where}: not of the model that the checkpoint was fused from", details=wrong)


def _repeated(files: GinFiles, tree: Recognized) -> dict[str, _Gin]:
    """The settings that gin files bind, as they bind them."""
    found = files.config()
    return {name: _Gin(found[name]) for name in _SETTINGS[_example(tree)] if name in found}


def _notes_on_settings(files: GinFiles | None, network: Mapping[str, Any], tree: Recognized) -> Iterator[str]:
    """What the settings of the network with a norm per source are."""
    settings = _SETTINGS[_example(tree)]
    unbound = ", ".join(f"{name} = {default!r}" for name, default in settings.items() if name not in network)
    yield f"a norm per source: the network is fusectl's, with the settings of t5x.examples.{_example(tree)}.{_CONFIG}"
    if files is None:
        yield "they are as the small model's gin file binds them; what it binds of another class, --gin FILE repeats"
        yield f"assumed for what it does not bind, T5X's defaults: {unbound}"
        return
    yield f"as {files.where} binds them: {', '.join(name for name in settings if name in network) or 'none'}"
    if unbound:
        yield f"assumed for what it does not bind, T5X's defaults: {unbound}"
    if unknown := ", ".join(name for name in files.config() if name not in {*network, *settings}):
        yield f"not repeated, since this network does not have them: {unknown}"


def _note_on_unused(files: GinFiles | None) -> Iterator[str]:
    if files is not None:
        yield f"what {files.where} binds stays in force: one norm needs none of it repeated"


def _note_on_schedule(checkpoint: Checkpoint, lr_offset: int) -> Iterator[str]:
    if lr_offset:
        yield _offset_in_words(checkpoint, lr_offset)
    elif checkpoint.step is not None:
        yield f"step {checkpoint.step:,}: schedules such as rsqrt_decay go on from there"


def _lines(
    path: str, imports: Iterable[str], bound: Mapping[str, Mapping[str, Any]], macros: Mapping[str, Any]
) -> Iterator[str]:
    """The lines of gin: what they import, and per configurable the values of its parameters."""
    yield "from __gin__ import dynamic_registration"
    # gin takes one import in a line, and dynamic registration only before any other import: pasted behind the imports
    # of the small model's file these lines are a syntax error.
    yield from dict.fromkeys(imports)
    # The macros that finetune.gin requires, and eval.gin and infer.gin.
    yield f"INITIAL_CHECKPOINT_PATH = {path!r}"
    yield "CHECKPOINT_PATH = %INITIAL_CHECKPOINT_PATH"
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
class _Gin:
    """A value by its text in gin."""

    text: str


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are, those that are gin's by their text."""
    return {name: literal(value.text) if isinstance(value, _Gin) else value for name, value in values.items()}


def _value(value: object) -> str:
    return value.text if isinstance(value, _Gin) else repr(value)
