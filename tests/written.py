"""Files that tests write and read in other packages' ways: Orbax, MaxText's moments, loss curves."""

import json
import warnings

import numpy as np
from models import SIZES

from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import format_named
from fusectl.formats.sink import save


# Adafactor factors what has two axes of 128 or more.
FACTORED = {**SIZES, "embed": 128, "mlp": 144}


def tree(path):
    """All that is known of a checkpoint's tree: the item, and every leaf and empty node by keys and kinds."""
    opened = open_checkpoint(str(path))
    leaves = {leaf.keys: (leaf.shape, leaf.dtype) for leaf in opened.leaves.values()}
    return opened.location.item, leaves, {(node.keys, node.value_type) for node in opened.nodes}


def written_by_orbax(at, values, name):
    import orbax.checkpoint as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=format_named(name).ocdbt, use_zarr3=format_named(name).zarr == 3
        )
        with ocp.CheckpointManager(at.parent, item_names=("items",), item_handlers={"items": handler}) as manager:
            manager.save(int(at.name), args=ocp.args.Composite(items=ocp.args.PyTreeSave(values)))
    return at


def restored(path):
    import orbax.checkpoint as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ocp.PyTreeCheckpointer().restore(path)


def trained(at, home, seed=0, biases=False):
    """MaxText's parameters, changed by a seed, in float64, with random moments beside them."""
    found, rng = np.load(home / "model.npz"), np.random.default_rng(seed)
    values = {}
    for name in found:
        if name.startswith("params/"):
            inside = name.removeprefix("params/")
            values[inside] = found[name].astype(np.float64) * (rng.uniform(0.9, 1.1, found[name].shape) if seed else 1)
            if biases and inside.endswith("qkv_proj/kernel"):
                shape = values[inside].shape[1:]
                bias = shape[-2:] if len(shape) == 2 else (shape[1], shape[0], shape[2])
                values[inside.replace("kernel", "bias")] = rng.normal(size=bias)
    tree = {f"params/params/{name}": v for name, v in values.items()}
    for moment in ("mu", "nu"):
        tree |= {f"opt_state/0/{moment}/params/{name}": rng.uniform(0.1, 1, v.shape) for name, v in values.items()}
    save(at, {**tree, "opt_state/0/count": np.array(7, np.int32), "step": np.array(7, np.int32)}, "orbax")
    return str(at)


def csv_of(at, rows, header="step,loss"):
    at.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(at)


def lines_of(at, rows):
    at.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(at)


def events_of(at, points, tag="loss", suffix="", old=False):
    """Event files as TensorBoard's own writer makes them: scalars as tensors, or as they were before."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(at), filename_suffix=suffix)
    for step, value in points:
        event = Event(step=step, wall_time=1.0)
        if old:
            event.summary.value.add(tag=tag, simple_value=value)
        else:
            kept = event.summary.value.add(tag=tag, tensor=make_tensor_proto(np.float32(value)))
            kept.metadata.plugin_data.plugin_name = "scalars"
        writer.add_event(event)
    writer.close()
    return str(at)
