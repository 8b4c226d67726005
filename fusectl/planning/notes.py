"""What plans of several operations say besides what they do."""

from __future__ import annotations

from collections.abc import Mapping

from fusectl.families.recognized import Recognized
from fusectl.formats.tree import Checkpoint
from fusectl.layout.mesh import Mesh


def notes_on_mesh(mesh: Mesh | None, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What a mesh does to the parameters of these shapes that JAX allows; raises Incompatible for what it does not."""
    if mesh is None:
        return []
    mesh.require_division((tree.rows[name].spec.axes, shape) for name, shape in shapes.items())
    sizes = {a: n for name, shape in shapes.items() for a, n in zip(tree.rows[name].spec.axes, shape, strict=True)}
    joined, heads = sizes.get("joined_kv", 0), sizes.get("heads", 0)
    if not joined or not heads or joined % heads:
        return []
    (share,), head = mesh.shard_shape(("joined_kv",), (joined,)), joined // heads
    if share % head == 0:
        return []
    return [f"mesh {mesh}: a device's {share} of joined_kv are no whole heads of {head}: JAX allows it"]


def notes_on_items(source: Checkpoint) -> list[str]:
    """What else is in the step that an item was taken from, and stays behind."""
    home, item = source.location.home, source.location.item
    if item is None:
        return []
    others = sorted(child.name for child in home.iterdir() if child.is_dir() and child.name != item)
    left = f"of the step's items only {item!r} is read; a trainer begins anew what is in {', '.join(others)}"
    return [left] if others else []
