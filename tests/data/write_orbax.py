"""Writes small checkpoints in every layout that the installed version of Orbax has, and what was written.

python write_orbax.py OUT T5.npz

runs in an environment with one version of Orbax; it makes OUT/VERSION/LAYOUT, one directory for each layout, and
OUT/VERSION/LAYOUT.msgpack, the truth: {where to open it, relative to LAYOUT: {name: leaf}}, the names being the keys of
the tree joined by "/". A leaf is one of

    [dtype, shape, bytes]                       an array or a number, its values in C order
    [dtype, shape, bytes, implementation]       keys of random numbers: their data
    ["string", value]
    ["None"], ["Dict"], ["List"], ["Tuple"], ["NamedTuple"]     an empty node

T5.npz holds the tree of `tests/models.py: state("t5-1.1", 0, layers=WRITTEN_LAYERS)`, from the project's own
environment, in tests/:

    python -c 'import numpy, models; numpy.savez("T5.npz", **models.state("t5-1.1", 0, layers=models.WRITTEN_LAYERS))'

The layouts t5* have no truth of their own: it is that tree. Orbax 0.12 writes OUT into its
markers: best a path that says nothing.

An environment for each version, with the libraries of its time:

    uv venv -p PYTHON VERSION
    uv pip install --python VERSION/bin/python --exclude-newer DATE --exclude-newer-package jaxlib=2026-11-01 \\
        orbax-checkpoint==VERSION jax==JAX jaxlib==JAX flax==FLAX

    VERSION  PYTHON  DATE        JAX     FLAX    and so numpy, optax, tensorstore
    0.2.7    3.9     2023-07-10  0.4.13  0.7.0   1.25.1  0.1.5  0.1.40
    0.3.5    3.9     2023-09-05  0.4.13  0.7.2   1.25.2  0.1.7  0.1.41
    0.4.3    3.10    2023-12-05  0.4.21  0.7.5   1.26.2  0.1.7  0.1.51
    0.4.8    3.10    2024-01-31  0.4.23  0.8.0   1.26.3  0.1.8  0.1.52
    0.5.3    3.10    2024-02-20  0.4.24  0.8.1   1.26.4  0.1.9  0.1.53
    0.5.20   3.10    2024-07-01  0.4.30  0.8.5   2.0.0   0.2.2  0.1.63
    0.5.23   3.10    2024-08-01  0.4.31  0.8.5   2.0.1   0.2.3  0.1.64
    0.6.4    3.10    2024-10-10  0.4.34  0.9.0   2.1.2   0.2.3  0.1.66
    0.7.0    3.10    2024-10-25  0.4.35  0.10.0  2.1.2   0.2.3  0.1.67
    0.11.30  3.12    2026-01-01  0.8.2   0.12.2  2.3.5   0.2.6  0.1.80
    0.12.8   3.12    -           0.10.2  0.12.8  2.5.5   0.2.8  0.1.86

(old wheels of jaxlib have been published anew since then). The archive, from OUT:

    tar -c --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --mode=u+rwX,go+rX,go-w --format=ustar */ |
        xz -9e --lzma2=preset=9e,dict=64MiB > orbax-written.tar.xz
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore
from flax import linen as nn
from flax.core import freeze
from flax.training import checkpoints, orbax_utils
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec


VERSION = tuple(int(part) for part in version("orbax-checkpoint").split("."))


class Pair(NamedTuple):
    left: Any
    right: Any


class Nothing(NamedTuple):
    pass


LAYOUTS = {}


def layout(since=(0,), until=(99,)):
    """Notes a layout for the versions that can write it."""

    def note(write):
        if since <= VERSION < until:
            LAYOUTS[write.__name__] = write
        return write

    return note


# ---- trees


def values(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def plain():
    return {
        "params": {
            "dense": {"kernel": jnp.asarray(values(6, 8)), "bias": jnp.asarray(values(8, seed=1))},
            "scale": jnp.asarray(values(3, seed=2), jnp.bfloat16),
        },
        "step": jnp.asarray(7, jnp.int32),
    }


def rich():
    return {
        "list": [jnp.asarray(values(2)), jnp.asarray(values(3))],
        "tuple": (jnp.asarray(values(4)), {"inner": jnp.asarray(values(2, 2))}),
        "pair": Pair(jnp.asarray(values(5)), jnp.asarray(values(1))),
        "nested": [[jnp.asarray(values(3, seed=3))], (jnp.asarray(values(2, seed=4)),)],
        "array": values(2, 3),
        "none": None,
        "empty": {
            "dict": {},
            "list": [],
            "tuple": (),
            "named": Nothing(),
            "in_list": [None, {}, jnp.asarray(values(2))],
        },
    }


def dtypes():
    names = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    names += ["float16", "float32", "float64", "complex64", "complex128"]
    numbers = np.array([[0, 1, 2], [3, 100, 127]])
    tree = {name: numbers.astype(name) for name in names}
    for name in ["bfloat16", "float8_e4m3fn", "float8_e5m2"]:
        # The tensorstore of before has no float8.
        if hasattr(jnp, name) and (VERSION >= (0, 4) or name == "bfloat16"):
            tree[name] = jnp.asarray(numbers, getattr(jnp, name))
    tree["jax_bool"] = jnp.asarray(numbers % 2 == 0)
    tree["jax_float16"] = jnp.asarray(numbers, jnp.float16)
    return tree


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


def train_state():
    network = Network()
    params = network.init(jax.random.PRNGKey(0), jnp.zeros((1, 2)))["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)
    return state.apply_gradients(grads=jax.tree_util.tree_map(jnp.ones_like, params))


def t5():
    tree = {}
    for name, array in np.load(T5).items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(array)
    return tree


# ---- what was written


def is_empty(node):
    return not jax.tree_util.tree_leaves(node, is_leaf=lambda child: child is not node)


def key_name(key):
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(key)


def leaf(value):
    if value is None or is_node(value):
        return [kind_of(value)]
    if isinstance(value, str):
        return ["string", value]
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, getattr(jax.dtypes, "prng_key", np.void)):
        return [*leaf(jax.random.key_data(value)), str(jax.random.key_impl(value))]
    array = np.asarray(value)
    return [array.dtype.name, list(array.shape), array.tobytes()]


def is_node(value):
    return isinstance(value, (dict, list, tuple)) or type(value).__name__ == "FrozenDict"


def kind_of(value):
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return "NamedTuple" if hasattr(value, "_fields") else "Tuple"
    return "List" if isinstance(value, list) else "Dict"


def truth(tree):
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)
    return {"/".join(key_name(key) for key in keys): leaf(value) for keys, value in found}


# ---- how to write


def reset():
    """Before 0.4.8 OCDBT is chosen for a whole process, by the handlers of types: has the next layout choose again."""
    if VERSION < (0, 4, 8):
        ocp.type_handlers.register_standard_handlers_with_options(use_ocdbt=False, ts_context=None)
        ocp.type_handlers._OCDBT_TS_CONTEXT = None


def handler(**options):
    if VERSION < (0, 3) and options.get("use_ocdbt"):
        context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100000000}})
        ocp.type_handlers.register_standard_handlers_with_options(use_ocdbt=True, ts_context=context)
    return ocp.PyTreeCheckpointHandler(**options)


def save(at, tree, save_args=None, **options):
    more = {} if save_args is None else {"save_args": save_args}
    ocp.Checkpointer(handler(**options)).save(at, tree, **more)
    return {".": tree}


def aggregated(tree, chosen=lambda name: True):
    """Arguments that aggregate the leaves whose names are chosen."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: ocp.SaveArgs(aggregate=chosen("/".join(key_name(key) for key in keys))), tree
    )


@layout()
def default(at):
    tree = plain()
    ocp.PyTreeCheckpointer().save(at, tree)
    return {".": tree}


@layout()
def zarr2dirs(at):
    return save(at, plain(), use_ocdbt=False)


@layout()
def zarr2dirs_rich(at):
    return save(at, rich(), use_ocdbt=False)


@layout()
def ocdbt(at):
    return save(at, plain(), use_ocdbt=True)


@layout()
def ocdbt_rich(at):
    return save(at, rich(), use_ocdbt=True)


@layout(since=(0, 4, 8))
def ocdbt_zarr3(at):
    return save(at, plain(), use_ocdbt=True, use_zarr3=True)


@layout(since=(0, 4, 8))
def zarr3dirs(at):
    return save(at, plain(), use_ocdbt=False, use_zarr3=True)


@layout()
def aggregate(at):
    tree = {**rich(), "bfloat16": jnp.asarray(values(3), jnp.bfloat16)}
    return save(at, tree, save_args=aggregated(tree))


@layout()
def aggregate_plain(at):
    tree = plain()
    return save(at, tree, save_args=aggregated(tree))


@layout()
def aggregate_dtypes(at):
    tree = dtypes()
    return save(at, tree, save_args=aggregated(tree))


@layout()
def aggregate_scalars(at):
    tree = scalars()
    return save(at, tree, save_args=aggregated(tree))


@layout()
def partly_aggregate(at):
    tree = plain()
    return save(at, tree, save_args=aggregated(tree, lambda name: not name.endswith("kernel")))


@layout()
def partly_aggregate_ocdbt(at):
    tree = plain()
    return save(at, tree, save_args=aggregated(tree, lambda name: not name.endswith("kernel")), use_ocdbt=True)


@layout()
def partly_aggregate_dirs(at):
    tree = rich()
    return save(at, tree, save_args=aggregated(tree, lambda name: "list" not in name), use_ocdbt=False)


@layout()
def asynchronous(at):
    tree = plain()
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    checkpointer.save(at, tree)
    checkpointer.wait_until_finished()
    return {".": tree}


@layout()
def dtypes_default(at):
    return save(at, dtypes())


@layout()
def dtypes_zarr2(at):
    return save(at, dtypes(), use_ocdbt=False)


@layout(since=(0, 4, 8))
def dtypes_zarr3(at):
    return save(at, dtypes(), use_ocdbt=False, use_zarr3=True)


def dotted():
    return {"a.b": {"c/d": jnp.asarray(values(2))}, "e/f.g": {"h": jnp.asarray(values(3))}, "i": {"j": values(2)}}


@layout()
def dots_slashes(at):
    return save(at, dotted())


@layout()
def dots_slashes_dirs(at):
    return save(at, dotted(), use_ocdbt=False)


@layout()
def dots_slashes_ocdbt(at):
    return save(at, dotted(), use_ocdbt=True)


@layout()
def int_keys(at):
    return save(at, {"layers": {0: jnp.asarray(values(2)), 1: jnp.asarray(values(3)), 10: jnp.asarray(values(4))}})


@layout()
def list_root(at):
    return save(at, [jnp.asarray(values(2)), {"a": jnp.asarray(values(3))}])


@layout()
def tuple_root(at):
    return save(at, (jnp.asarray(values(2)), [jnp.asarray(values(3))]))


@layout()
def jax_scalars(at):
    return save(at, {"step": jnp.asarray(7, jnp.int32), "scale": jnp.float32(0.5), "half": jnp.bfloat16(1.5)})


def scalars():
    return {
        "int": 7,
        "negative": -3,
        "large": 1 << 40,
        "float": 0.1,
        "np_float32": np.float32(0.1),
        "np_int64": np.int64(1 << 40),
        "array": values(2, 2),
    }


@layout()
def np_scalars(at):
    return save(at, scalars())


@layout()
def rich_default(at):
    return save(at, rich())


def standard_save(at, tree):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(at, tree)
    if hasattr(checkpointer, "wait_until_finished"):
        checkpointer.wait_until_finished()
    return {".": tree}


@layout(since=(0, 3))
def standard(at):
    return standard_save(at, plain())


@layout(since=(0, 3))
def standard_rich(at):
    return standard_save(at, rich())


def sharded_tree():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    put = lambda array, *axes: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
    return {
        "both": put(values(4, 6), "x", "y"),
        "one": put(values(4, 6, seed=1), None, "x"),
        "replicated": put(values(3)),
        "joined": put(values(8, 2), ("x", "y")),
    }


@layout()
def sharded(at):
    return save(at, sharded_tree())


@layout()
def sharded_zarr2(at):
    return save(at, sharded_tree(), use_ocdbt=False)


@layout(since=(0, 4, 8))
def sharded_zarr3(at):
    return save(at, sharded_tree(), use_ocdbt=True, use_zarr3=True)


@layout()
def save_cast_bf16(at):
    tree = plain()["params"]
    args = jax.tree_util.tree_map(lambda _: ocp.SaveArgs(dtype=jnp.dtype(jnp.bfloat16)), tree)
    save(at, tree, save_args=args)
    return {".": jax.tree_util.tree_map(lambda x: x.astype(jnp.bfloat16), tree)}


@layout()
def aggregate_cast_bf16(at):
    tree = plain()["params"]
    args = jax.tree_util.tree_map(lambda _: ocp.SaveArgs(aggregate=True, dtype=jnp.dtype(jnp.bfloat16)), tree)
    save(at, tree, save_args=args)
    return {".": jax.tree_util.tree_map(lambda x: x.astype(jnp.bfloat16), tree)}


def zero_tree():
    """Of whose chunks tensorstore stores none or not all, where Orbax does not ask for them."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    halves = np.concatenate([np.zeros((2, 3), np.float32), values(2, 3)])
    return {
        "zeros": jnp.zeros((2, 3)),
        "numpy": np.zeros((3,), np.int32),
        "scalar": 0,
        "half": jax.device_put(halves, NamedSharding(mesh, PartitionSpec("x"))),
        "w": values(2),
    }


@layout()
def zeros(at):
    return save(at, zero_tree())


@layout()
def zeros_dirs(at):
    return save(at, zero_tree(), use_ocdbt=False)


@layout(since=(0, 4, 8))
def zeros_zarr3(at):
    return save(at, zero_tree(), use_ocdbt=False, use_zarr3=True)


@layout()
def flax_trainstate(at):
    return save(at, train_state())


@layout()
def flax_save_args(at):
    state = {"model": train_state(), "config": {"features": 4, "rate": 0.5}, "data": [values(3)]}
    return save(at, state, save_args=orbax_utils.save_args_from_target(state))


@layout()
def flax_frozen(at):
    tree = freeze(plain())
    return save(at, tree, save_args=orbax_utils.save_args_from_target(tree))


@layout()
def flax_save_orbax(at):
    state = train_state()
    checkpoints.save_checkpoint(str(at), state, step=5, orbax_checkpointer=ocp.PyTreeCheckpointer())
    return {"checkpoint_5": state}


@layout()
def flax_msgpack(at):
    import flax

    flax.config.update("flax_use_orbax_checkpointing", False)
    state = train_state()
    checkpoints.save_checkpoint(str(at), state, step=7)
    return {"checkpoint_7": state}


def manager(at, *args, **kwargs):
    options = {"create": True, **kwargs.pop("options", {})}
    return ocp.CheckpointManager(at, *args, options=ocp.CheckpointManagerOptions(**options), **kwargs)


def finish(managed):
    if hasattr(managed, "wait_until_finished"):
        managed.wait_until_finished()
    if hasattr(managed, "close"):
        managed.close()


@layout(since=(0, 5))
def manager_default(at):
    tree = plain()
    managed = manager(at)
    managed.save(3, args=ocp.args.StandardSave(plain()))
    managed.save(12, args=ocp.args.StandardSave(tree))
    finish(managed)
    return {".": tree, "3": tree, "12": tree, "12/default": tree}


@layout(since=(0, 5))
def manager_composite(at):
    state, params = plain(), rich()
    managed = manager(at, item_names=("state", "params", "about"))
    managed.save(
        5,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            params=ocp.args.PyTreeSave(params),
            about=ocp.args.JsonSave({"lr": 0.5, "name": "x"}),
        ),
    )
    finish(managed)
    return {"5/state": state, "5/params": params}


@layout(until=(0, 13))
def manager_items_old(at):
    state, params = plain(), rich()
    managed = manager(at, {"state": ocp.PyTreeCheckpointer(), "params": ocp.PyTreeCheckpointer()})
    managed.save(5, {"state": state, "params": params})
    finish(managed)
    return {"5/state": state, "5/params": params}


@layout(until=(0, 13))
def manager_single_old(at):
    tree = plain()
    managed = manager(at, ocp.PyTreeCheckpointer())
    managed.save(5, tree)
    finish(managed)
    return {".": tree, "5": tree, "5/default": tree}


@layout()
def manager_flax(at):
    """As Flax's guide had it: a train state, a config and data, all aggregated."""
    state = {"model": train_state(), "config": {"features": 4, "rate": 0.5}, "data": [values(3)]}
    managed = manager(at, ocp.PyTreeCheckpointer(), options={"max_to_keep": 2})
    managed.save(5, state, save_kwargs={"save_args": orbax_utils.save_args_from_target(state)})
    finish(managed)
    return {".": state, "5": state, "5/default": state}


def manager_named(at, name, **options):
    tree = plain()
    if VERSION < (0, 5):
        managed = manager(at, ocp.PyTreeCheckpointer(), options=options)
        managed.save(5, tree)
    else:
        # Saved in the background, 0.5 does not know such names again.
        managed = manager(at, options={**options, "enable_async_checkpointing": False})
        managed.save(5, args=ocp.args.StandardSave(tree))
    finish(managed)
    return {".": tree, name: tree}


@layout()
def manager_prefix(at):
    return manager_named(at, "ckpt_5", step_prefix="ckpt")


@layout()
def manager_fixed(at):
    return manager_named(at, "00000005", step_format_fixed_length=8)


@layout()
def manager_prefix_fixed(at):
    return manager_named(at, "my_net_00000005", step_prefix="my_net", step_format_fixed_length=8)


@layout()
def array_handler(at):
    array = jnp.asarray(values(2, 3))
    ocp.Checkpointer(ocp.ArrayCheckpointHandler()).save(at, array)
    return {".": {"checkpoint": array}}


@layout()
def array_handler_aggregated(at):
    array = values(2, 3)
    ocp.Checkpointer(ocp.ArrayCheckpointHandler()).save(at, array, ocp.SaveArgs(aggregate=True))
    # Its name in the aggregate file, and in the tree that newer versions make of it.
    return {".": {"ELEMENT" if VERSION < (0, 6) else "checkpoint": array}}


@layout()
def strings(at):
    return save(at, {"w": jnp.asarray(values(3)), "note": "hello", "names": ["a", "b"]})


@layout()
def strings_aggregated(at):
    tree = {"w": jnp.asarray(values(3)), "note": "hello", "names": ["a", "b"]}
    return save(at, tree, save_args=aggregated(tree))


@layout(since=(0, 8))
def random_keys(at):
    return save(at, {"fry": jax.random.key(7), "rbg": jax.random.key(7, impl="rbg"), "w": jnp.asarray(values(3))})


@layout(since=(0, 4))
def zero_size(at):
    return save(at, {"w": jnp.asarray(values(3)), "none": np.zeros((0, 4), np.float32)})


@layout()
def zero_size_aggregated(at):
    tree = {"w": jnp.asarray(values(3)), "none": np.zeros((0, 4), np.float32)}
    return save(at, tree, save_args=aggregated(tree))


@layout()
def leaf_d(at):
    return save(at, {"c": jnp.asarray(values(3)), "d": jnp.asarray(values(2))}, use_ocdbt=False)


@layout()
def leaf_d_ocdbt(at):
    return save(at, {"c": jnp.asarray(values(3)), "d": jnp.asarray(values(2))}, use_ocdbt=True)


@layout()
def side_by_side(at):
    teacher, student = plain(), {"params": {"kernel": jnp.asarray(values(4, 4))}}
    save(at / "models/teacher", teacher)
    save(at / "models/student", student)
    return {"models/teacher": teacher, "models/student": student}


@layout()
def item_alone(at):
    """An item that no manager saved, in a directory that looks like a step."""
    tree = plain()
    save(at / "0/items", tree)
    return {"0": tree, "0/items": tree}


@layout(since=(0, 11, 30))
def v1_pytree(at):
    from orbax.checkpoint.experimental import v1

    tree = plain()
    v1.save_pytree(at, tree)
    return {".": tree}


@layout(since=(0, 11, 30))
def v1_rich(at):
    from orbax.checkpoint.experimental import v1

    tree = rich()
    v1.save_pytree(at, tree)
    return {".": tree}


@layout(since=(0, 11, 30))
def v1_training(at):
    from orbax.checkpoint.experimental import v1

    tree = plain()
    with v1.training.Checkpointer(at) as checkpointer:
        checkpointer.save_pytree(5, tree)
    return {".": tree, "5": tree}


WITH_T5 = [(0, 2, 7), (0, 3, 5), (0, 4, 3), (0, 5, 3), (0, 5, 20)]


def t5_layouts():
    whole = {"t5": lambda name: False}
    chosen = {
        "t5_slots_aggregated": lambda name: name.startswith("state/param_states/"),
        "t5_step_aggregated": lambda name: name == "state/step",
        "t5_norms_aggregated": lambda name: name.startswith("target/") and name.endswith("/scale"),
    }

    def write(at, choose):
        tree = t5()
        save(at, tree, save_args=aggregated(tree, choose))

    for name, choose in {**whole, **chosen}.items() if VERSION in WITH_T5 else ():
        LAYOUTS[name] = functools.partial(write, choose=choose)


def write_all(out, only):
    t5_layouts()
    for name, write in LAYOUTS.items():
        if only and name not in only:
            continue
        at = out / name
        shutil.rmtree(at, ignore_errors=True)
        reset()
        try:
            written = write(at)
        except Exception as error:
            shutil.rmtree(at, ignore_errors=True)
            print(f"{name}: not written: {type(error).__name__}: {str(error)[:200]}")
            if only:
                traceback.print_exc()
            continue
        if written is not None:
            found = {where: truth(tree) for where, tree in written.items()}
            (out / f"{name}.msgpack").write_bytes(msgpack.packb(found))
    for left in out.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left)


if __name__ == "__main__":
    T5 = sys.argv[2]
    directory = Path(sys.argv[1]).resolve() / ".".join(map(str, VERSION))
    directory.mkdir(parents=True, exist_ok=True)
    write_all(directory, sys.argv[3:])
