"""MaxText's overrides, as its command line takes them: `key=value`, without spaces, behind those of the run.

Sources: maxtext/configs/{base.yml,types.py,pyconfig.py} for the keys, maxtext/common/checkpointing.py for the restore:
the newest step of the run's own directory comes first, then load_parameters_path or load_full_state_path. Post-training
restores by maxtext/utils/model_creation_utils.py, from_pretrained, and by Tunix's checkpoint manager.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from fusectl.families.config import MAXTEXT_SIZES, counted_sizes
from fusectl.families.kinds import Trainer
from fusectl.families.naming import MAXTEXT
from fusectl.families.recognized import Recognized
from fusectl.formats.locate import names_in
from fusectl.formats.objects import Place
from fusectl.formats.record import Record
from fusectl.formats.registry import format_named
from fusectl.formats.tree import Checkpoint, Location
from fusectl.optimizer.state import is_state
from fusectl.restart.base import Restart, notes_on_history, notes_on_norm, require_no_gin, require_read
from fusectl.sources.packed_qkv import PACKED


_STEPS, _ITEM = "checkpoints", "items"
# In directories of these names MaxText looks for parameters without that prefix.
_WITHOUT_PREFIX = ("model", "model_params")
# MaxText has no place for learning rates of single parameters: a program that starts it puts them around its optimizer
# (optimizers.get_optimizer, which all of its trainers call by this name).
_RATES = """
from absl import app
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

import grown_rates

own = optimizers.get_optimizer
optimizers.get_optimizer = lambda *words, **named: grown_rates.rescaled(own(*words, **named))
app.run(train.main)
"""
_MARK = "#> "

Pairs = Iterator[tuple[str, Any]]


def restart_of(checkpoint: Checkpoint, tree: Recognized, lr_offset: int = 0, gin: Sequence[str] = ()) -> Restart:
    """The overrides for a checkpoint of one of MaxText's families; raises NotRead for one in T5X's format."""
    require_no_gin(Trainer.MAXTEXT, lr_offset, gin)
    require_read(checkpoint, Trainer.MAXTEXT)
    run = _run(checkpoint.location)
    path, has_state = str(checkpoint.location.index), any(map(is_state, checkpoint.leaves))
    overrides = {**dict(_network(tree)), **dict(_told(tree)), **dict(_layout(checkpoint))}
    if any(f"/{PACKED}/" in name for name in checkpoint.leaves):
        overrides["fused_qkv"] = True
    # load_full_state_path is for states that lie outside of a run: in a run's own directory MaxText takes the newest
    # step before it looks at any path.
    if not has_state:
        overrides["load_parameters_path"] = path
    elif run is None:
        overrides["load_full_state_path"] = path
    else:
        overrides |= {"base_output_directory": str(run[0]), "run_name": run[1]}
    notes = [
        "behind the command line of the small model's run; what is not set here stays as it was there",
        *_notes_on_network(tree),
        *notes_on_norm(checkpoint.record, Trainer.MAXTEXT),
    ]
    if has_state and run is not None:
        notes.append(f"or, in a run of another name, load_full_state_path={path} without these two")
    else:
        notes.append("run_name is to be a new one: a run that has steps of its own goes on with the newest of them")
    if has_state and run is None:
        notes.append("or as the newest step of a run, BASE/RUN/checkpoints/STEP/items, with its name and no path")
    if has_state and checkpoint.step is not None:
        notes.append(f"step {checkpoint.step:,}: the schedule goes on from there, up to steps=")
    if not has_state:
        notes.append("without optimizer state: MaxText begins a new one, at step 0, which needs a warm-up")
    notes += notes_on_history(checkpoint.record)
    notes += _notes_on_naming(checkpoint, tree)
    lines = tuple(f"{key}={_value(value)}" for key, value in overrides.items())
    if any(character.isspace() for line in lines for character in line):
        notes.append("a path with spaces, to be put in quotes by hand: $(…) would cut it")
    values: dict[str, Any] = {"overrides": overrides}
    if _has_rates(checkpoint.record):
        notes += _notes_on_rates(checkpoint)
        lines += tuple(f"{_MARK}{line}".rstrip() for line in _RATES.strip().splitlines())
        values["rates"] = _RATES.lstrip()
    return Restart(Trainer.MAXTEXT, checkpoint.path, tuple(notes), lines, values)


def _has_rates(record: Record | None) -> bool:
    """Whether learning rates are known by which it moves as before: of equal copies."""
    return record is not None and record.self_fused and len(set(record.weights)) == 1


def _notes_on_rates(checkpoint: Checkpoint) -> Iterator[str]:
    """How the lines for the rates get to MaxText, and what they do not survive."""
    printed = f"fusectl restart-config {shlex.quote(checkpoint.path)} | sed -n 's/^{_MARK}*//p' > train_grown.py"
    yield f"Adam, at rates by which it moves as before: {printed}"
    yield (
        "next to the grown_rates.py of self-fuse --lr-table grown_rates.py, then python train_grown.py stands for "
        "python -m maxtext.trainers.pre_train.train"
    )
    yield (
        "these are exact for gradient_clipping_threshold=0.0 only: by default gradients are clipped by their global "
        "norm, which is another one in a wider model"
    )


def _notes_on_naming(checkpoint: Checkpoint, tree: Recognized) -> Iterator[str]:
    """Who finds the parameters by the names that they have."""
    if tree.naming.suffix:
        yield "MaxText's post-training (train_sft, train_dpo, train_rl) finds these parameters, pre-training does not"
        yield "or as the newest step of a post-training run, BASE/RUN/checkpoints/STEP/model_params, with no path"
    elif tree.naming != MAXTEXT or checkpoint.location.index.name in _WITHOUT_PREFIX:
        named = " and ".join(_WITHOUT_PREFIX)
        yield f"MaxText looks for {MAXTEXT.prefix}…, in directories of any name but {named}: here it finds none"


def _network(tree: Recognized) -> Pairs:
    """What the tree tells."""
    own = counted_sizes(tree.sizes, tree.depths, tree.family.blocks)
    # The keys begin with base_: MaxText multiplies these sizes with factors that follow from global_parameter_scale,
    # which is 1 by default and has to stay so.
    yield from ((key, own[axis]) for axis, key in MAXTEXT_SIZES.items())
    # For runs with a model_name, whose own sizes these replace.
    yield "override_model_config", True
    if len(tree.family.blocks) == 1:
        yield "decoder_block", tree.family.blocks[0]
    yield "scan_layers", tree.scanned
    yield from (("param_scan_axis", axis) for axis in _scan_axes(tree))
    roles = {role for row in tree.rows.values() for role in row.roles}
    yield "logits_via_embedding", tree.family.tied
    if tree.family.tied:
        yield "normalize_embedding_logits", tree.network.tied_logits_power != 0.0
    if any("gate" in row.roles and "up" in row.roles for row in tree.rows.values()):
        yield "fused_mlp", True
    if "query_norm" in roles:
        yield "use_qk_norm", True
    if "query_bias" in roles:
        yield "attention_bias", True
    if "post_attention_norm" in roles:
        yield "use_post_attn_norm", True
    if "post_mlp_norm" in roles:
        yield "use_post_ffw_norm", True


def _scan_axes(tree: Recognized) -> set[int]:
    """The axis along which layers are scanned: it is the same one for all tensors."""
    return {row.spec.axes.index("layers") for row in tree.rows.values() if "layers" in row.spec.axes}


def _told(tree: Recognized) -> Pairs:
    """What a config told of the network when the checkpoint was written."""
    network = tree.network
    # Only what a config told is printed. Anything else has stayed as the run has it, and a default of fusectl's could
    # replace a setting that the run had changed.
    if "activation" in network.told:
        yield "mlp_activations", [network.activation, "linear"]
    if network.told & {"norm_epsilon", "final_norm_epsilon"}:
        own = network.final_norm_epsilon
        yield "normalization_layer_epsilon", network.norm_epsilon if own is None else own
    # MaxText's 0 is none.
    if "attention_soft_cap" in network.told:
        yield "attn_logits_soft_cap", network.attention_soft_cap or 0.0
    if "logits_soft_cap" in network.told:
        yield "final_logits_soft_cap", network.logits_soft_cap or 0.0
    if "rope_type" in network.told:
        yield "rope_type", network.rope_type
    if "attending" in network.told:
        local = next((each for each in network.attending if each.window is not None), None)
        around = next((each for each in network.attending if each.window is None), network.attending[0])
        yield "rope_max_timescale", int(around.rope_base)
        yield "rope_linear_scaling_factor", around.rope_scale
        if local is not None:
            yield "local_rope_max_timescale", int(local.rope_base)
            yield "sliding_window_size", local.window


def _layout(checkpoint: Checkpoint) -> Pairs:
    """How it lies on disk, where that is not MaxText's default, OCDBT and zarr v3."""
    layout = format_named(checkpoint.format)
    if not layout.ocdbt:
        yield "checkpoint_storage_use_ocdbt", False
    if layout.zarr != 3:
        yield "checkpoint_storage_use_zarr3", False


def _notes_on_network(tree: Recognized) -> Iterator[str]:
    blocks = tree.family.blocks
    if len(blocks) > 1:
        names = f"{', '.join(blocks[:-1])} or {blocks[-1]}"
        yield f"decoder_block, or a model_name that sets it, as before: {names}, whose trees are the same"
    if tree.family.tied and "tied_logits_power" not in tree.network.told:
        yield (
            "normalize_embedding_logits as the public models have it, since no --config has told it when it was fused: "
            "if the small model's run had another, the function is another one"
        )
    if "gemma2" in blocks:
        yield "base_num_decoder_layers counts pairs of layers, as MaxText's gemma2 does"
    if "gemma3" in blocks:
        yield (
            "model_name stays gemma3-4b, gemma3-12b or gemma3-27b, with override_model_config=True: "
            "the scale of queries and the rope go by it"
        )


def _run(location: Location) -> tuple[Place, str] | None:
    """The base directory and the name of the run whose newest step a checkpoint is; None if it is not."""
    steps = location.home.parent
    if location.item != _ITEM or steps.name != _STEPS or not location.home.name.isdecimal() or not steps.parent.name:
        return None
    try:
        newest = max(int(name) for name in names_in(steps) if name.isdecimal())
    except OSError:
        # Who cannot list it can still name the checkpoint.
        return None
    return (steps.parent.parent, steps.parent.name) if newest == int(location.home.name) else None


def _value(value: Any) -> str:
    """A value as a word of the shell.

    >>> _value(["gelu", "linear"]), _value(True), _value(1e-6)
    ('["gelu","linear"]', 'True', '1e-06')
    """
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)
