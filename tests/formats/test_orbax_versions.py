"""What eleven versions of Orbax wrote, in every layout that they have, is read, checked and converted to the bit.

tests/data/write_orbax.py wrote it, in an environment for each of them, with a note of what it wrote.
"""

import lzma
import shutil
import tarfile
from pathlib import Path

import msgpack
import pytest
from cases import some_soon, thinned
from models import WRITTEN_LAYERS, state

from fusectl.errors import Incompatible
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.inspection.fsck import fsck
from fusectl.operations.convert import plan_conversion
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


ARCHIVE = Path(__file__).parent.parent / "data/orbax-written.tar.xz"

ALL = ("0.2.7", "0.3.5", "0.4.3", "0.4.8", "0.5.3", "0.5.20", "0.5.23", "0.6.4", "0.7.0", "0.11.30", "0.12.8")
FROM = {version: ALL[i:] for i, version in enumerate(ALL)}
AGGREGATING = ("0.2.7", "0.3.5", "0.4.3", "0.5.3", "0.5.20")

# Which versions wrote which layouts: all that can.
WRITTEN = {
    ALL: """
        aggregate aggregate_cast_bf16 aggregate_dtypes aggregate_plain aggregate_scalars array_handler
        array_handler_aggregated asynchronous default dots_slashes dots_slashes_dirs dots_slashes_ocdbt dtypes_default
        dtypes_zarr2 flax_frozen flax_msgpack flax_save_args flax_save_orbax flax_trainstate int_keys item_alone
        jax_scalars leaf_d leaf_d_ocdbt list_root manager_fixed manager_flax manager_items_old manager_prefix
        manager_single_old np_scalars ocdbt ocdbt_rich partly_aggregate partly_aggregate_dirs partly_aggregate_ocdbt
        rich_default save_cast_bf16 sharded sharded_zarr2 side_by_side strings_aggregated tuple_root zarr2dirs
        zarr2dirs_rich zeros zeros_dirs
    """,
    FROM["0.3.5"]: "standard standard_rich strings",
    FROM["0.4.8"]: "ocdbt_zarr3 sharded_zarr3 zarr3dirs",
    FROM["0.5.3"]: "manager_composite manager_default",
    FROM["0.5.20"]: "dtypes_zarr3 zeros_zarr3",
    FROM["0.11.30"]: "random_keys v1_pytree v1_rich v1_training",
    # 0.5 does not know the name of such a step again, and fails.
    ("0.2.7", "0.3.5", "0.4.3", "0.4.8", "0.6.4", "0.7.0", "0.11.30", "0.12.8"): "manager_prefix_fixed",
    ("0.4.8", "0.5.3", "0.5.20", "0.5.23"): "zero_size",
    ("0.2.7", "0.3.5", "0.4.3", "0.4.8", "0.5.3", "0.5.20", "0.5.23"): "zero_size_aggregated",
    # A small T5 1.1 with Adafactor's slots.
    AGGREGATING: "t5 t5_norms_aggregated t5_slots_aggregated t5_step_aggregated",
}
CELLS = [(version, name) for versions, names in WRITTEN.items() for name in names.split() for version in versions]

# Opening these raises Incompatible.
REFUSED = {
    # Flax's own files.
    "flax_msgpack": ALL,
    # One array without a tree; later versions put it into one, as those did that aggregated it.
    "array_handler": ALL[:9],
    "array_handler_aggregated": ("0.6.4", "0.7.0"),
    # Every key with a slash has a database of its own.
    "dots_slashes_ocdbt": ALL[:2],
}
# Read, but no format can hold an array without values.
NOT_CONVERTED = {"zero_size", "zero_size_aggregated"}
# Formats whose arrays lie beside their index: one cannot be called `checkpoint`, as an array handler's is.
NOT_BESIDE = ("t5x", "orbax-zarr2", "orbax-zarr3")

# One cell for each way in which the versions keep a tree.
SOON = {
    # Without `_METADATA`: in directories, in a database, in the index, in part of it; strings.
    ("0.2.7", "zarr2dirs_rich"),
    ("0.3.5", "ocdbt_rich"),
    ("0.2.7", "manager_flax"),
    ("0.3.5", "partly_aggregate_dirs"),
    ("0.3.5", "strings"),
    ("0.3.5", "strings_aggregated"),
    # With an index of each kind.
    ("0.3.5", "standard_rich"),
    ("0.4.3", "aggregate_dtypes"),
    ("0.5.3", "partly_aggregate"),
    ("0.5.20", "aggregate"),
    ("0.5.20", "partly_aggregate_dirs"),
    ("0.5.20", "aggregate_scalars"),
    ("0.5.20", "strings_aggregated"),
    ("0.5.20", "t5_slots_aggregated"),
    # With `_METADATA` alone.
    ("0.5.20", "zeros_zarr3"),
    ("0.5.23", "zarr2dirs_rich"),
    ("0.7.0", "manager_prefix_fixed"),
    ("0.12.8", "item_alone"),
    ("0.12.8", "random_keys"),
    ("0.12.8", "strings"),
    ("0.12.8", "v1_pytree"),
}
# Layouts that no cell in three has.
LAYOUTS_ELSEWHERE = {("0.12.8", "v1_rich"), ("0.12.8", "array_handler")}
CONVERTED_SOON = {
    ("0.2.7", "manager_flax"),
    ("0.3.5", "partly_aggregate_dirs"),
    ("0.4.3", "aggregate_dtypes"),
    ("0.5.20", "aggregate"),
    ("0.12.8", "leaf_d"),
    ("0.12.8", "random_keys"),
    ("0.12.8", "strings"),
}
REFUSED_SOON = {("0.2.7", "dots_slashes_ocdbt"), ("0.2.7", "flax_msgpack"), ("0.5.20", "array_handler")}


class Written:
    """The archive, unpacked cell by cell."""

    def __init__(self, archive: tarfile.TarFile, at: Path) -> None:
        self.archive, self.at = archive, at
        self.members: dict[tuple[str, str], list[tarfile.TarInfo]] = {}
        for member in archive.getmembers():
            version, _, rest = member.name.partition("/")
            self.members.setdefault((version, rest.split("/")[0]), []).append(member)

    @property
    def cells(self) -> set[tuple[str, str]]:
        return {cell for cell in self.members if cell[1] and not cell[1].endswith(".msgpack")}

    def directory(self, version: str, name: str) -> Path:
        self.archive.extractall(self.at, self.members[version, name], filter="data")
        return self.at / version / name

    def truth(self, version: str, name: str) -> dict[str, dict[str, list]]:
        """What was written: {where to open it: {name: leaf}}, as write_orbax.py describes it."""
        if name.startswith("t5"):
            arrays = state("t5-1.1", seed=0, layers=WRITTEN_LAYERS)
            return {".": {leaf: [str(x.dtype), list(x.shape), x.tobytes()] for leaf, x in arrays.items()}}
        [member] = self.members[version, f"{name}.msgpack"]
        return msgpack.unpackb(self.archive.extractfile(member).read())


@pytest.fixture(scope="module")
def orbax_written(tmp_path_factory):
    at = tmp_path_factory.mktemp("orbax")
    with lzma.open(ARCHIVE) as packed, (at / "all.tar").open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    with tarfile.open(at / "all.tar") as archive:
        yield Written(archive, at)


def is_refused(version, name):
    return version in REFUSED.get(name, ())


def cannot_hold(form, name, leaves):
    return name in NOT_CONVERTED or ("checkpoint" in leaves and form in NOT_BESIDE)


def kept(kind, version):
    """The kind of an empty node that a version notes for it."""
    if kind == "NamedTuple" or (kind == "Tuple" and version not in FROM["0.7.0"]):
        return "None"
    return kind


def leaves_of(path):
    """The leaves of a checkpoint as write_orbax.py notes them."""
    opened = open_checkpoint(str(path))
    found = {node.name: [node.value_type, *([node.text] if node.text is not None else [])] for node in opened.nodes}
    for name, leaf in opened.leaves.items():
        found[name] = [leaf.dtype, list(leaf.shape), opened.read(name).tobytes()]
        if leaf.random_key is not None:
            found[name].append(leaf.random_key)
    return found


def expected(written, version):
    """What is left of what was written: all of it but for some kinds of empty nodes."""
    return {name: leaf if len(leaf) > 1 else [kept(leaf[0], version)] for name, leaf in written.items()}


def keys_of(path):
    """The keys of leaves and empty nodes, with their kinds, which names do not tell."""
    opened = open_checkpoint(str(path))
    return {leaf.keys for leaf in opened.leaves.values()} | {node.keys for node in opened.nodes}


def as_t5x(leaves):
    """What a tree's leaves become where T5X has a step of its own."""
    leaves = dict(leaves)
    if "step" in leaves:
        leaves["state/step"] = leaves.pop("step")
    return leaves


def convert(source, out, format):
    plan, sources = plan_conversion(str(source), Options(format=format))
    carry_out(plan, sources, out)
    return out


def assert_converted(path, before, form, tmp_path, *, back=True):
    """Converts a checkpoint to a format, and back to its own, or to Orbax's newest where its own is not written."""
    own = open_checkpoint(str(path)).format
    there = convert(path, tmp_path / form, form)
    converted = leaves_of(there)
    if form == "t5x":
        if "state/step" not in as_t5x(before):
            # T5X has none without.
            del converted["state/step"]
        # Its index has no other empty nodes, nor keys of random numbers.
        values = lambda leaves: {name: leaf[:3] for name, leaf in leaves.items() if len(leaf) > 2}
        assert values(converted) == values(as_t5x(before))
    else:
        assert converted == before
    if back:
        again = convert(there, tmp_path / f"{form}-back", own if own in FORMATS else "orbax")
        assert leaves_of(again) == before
        assert keys_of(again) == keys_of(path)


def cells(*, refused, soon, every=1):
    """The cells that are refused, or those that are not: slow, but for a few, and exhaustive but for one of `every`."""
    found = [cell for cell in CELLS if is_refused(*cell) == refused]
    assert set(found) >= soon
    return some_soon(thinned(found, every), soon.__contains__)


@pytest.mark.slow
def test_the_table_is_what_the_archive_holds(orbax_written):
    assert len(CELLS) == len(set(CELLS))
    assert set(CELLS) == orbax_written.cells
    assert {name for _, name in CELLS} >= {*REFUSED, *NOT_CONVERTED}


@pytest.mark.parametrize(("version", "name"), cells(refused=False, soon=SOON))
def test_what_a_version_wrote_is_read(orbax_written, version, name):
    at = orbax_written.directory(version, name)
    for where, leaves in orbax_written.truth(version, name).items():
        assert leaves_of(at / where) == expected(leaves, version)
        assert fsck(str(at / where)).problems == ()


def forms_of(version, name):
    """What a cell is converted to: T5X, which knows least of a tree, and one of Orbax's layouts in turn; all of them
    where it is done each time. Three hundred tensors take ten times as long as the others' few: only T5X.
    """
    orbax = [form for form in FORMATS if form != "t5x"]
    if name.startswith("t5"):
        return ["t5x"]
    if (version, name) in CONVERTED_SOON:
        return ["t5x", *orbax]
    return ["t5x", orbax[CELLS.index((version, name)) % len(orbax)]]


@pytest.mark.slow
@pytest.mark.parametrize(("version", "name"), cells(refused=False, soon=CONVERTED_SOON | LAYOUTS_ELSEWHERE, every=3))
def test_what_a_version_wrote_is_converted(orbax_written, tmp_path, version, name):
    where, leaves = next(iter(orbax_written.truth(version, name).items()))
    at, before = orbax_written.directory(version, name) / where, expected(leaves, version)
    for form in forms_of(version, name):
        if cannot_hold(form, name, leaves):
            with pytest.raises(Incompatible):
                convert(at, tmp_path / form, form)
        else:
            # T5X's index knows least of a tree, so that is the way back which matters.
            back = form == "t5x" or (version, name) in CONVERTED_SOON
            assert_converted(at, before, form, tmp_path, back=back)


@pytest.mark.parametrize(("version", "name"), cells(refused=True, soon=REFUSED_SOON))
def test_what_is_not_read_is_refused(orbax_written, version, name):
    at = orbax_written.directory(version, name)
    for where in orbax_written.truth(version, name):
        with pytest.raises(Incompatible):
            open_checkpoint(str(at / where))


def flipped(leaf):
    return [*leaf[:2], bytes([leaf[2][0] ^ 1]) + leaf[2][1:], *leaf[3:]]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda leaves: leaves.update(array=flipped(leaves["array"])), id="one bit of a value"),
        pytest.param(lambda leaves: leaves["array"].__setitem__(1, [3, 2]), id="a shape"),
        pytest.param(lambda leaves: leaves["array"].__setitem__(0, "int32"), id="a dtype"),
        pytest.param(lambda leaves: leaves.pop("array"), id="a leaf that was not written"),
        pytest.param(lambda leaves: leaves.update(more=leaves["array"]), id="a leaf that is lost"),
        pytest.param(lambda leaves: leaves.update(none=["Dict"]), id="the kind of an empty node"),
        pytest.param(lambda leaves: leaves.pop("none"), id="an empty node"),
    ],
)
def test_another_truth_is_seen(orbax_written, change):
    version, name = "0.6.4", "rich_default"
    leaves = orbax_written.truth(version, name)["."]
    found = leaves_of(orbax_written.directory(version, name))
    assert found == expected(leaves, version)
    change(leaves)

    assert found != expected(leaves, version)


def test_a_conversion_of_other_values_is_seen(orbax_written, tmp_path):
    version, name = "0.6.4", "default"
    at, leaves = orbax_written.directory(version, name), orbax_written.truth(version, name)["."]
    leaves["params/scale"] = flipped(leaves["params/scale"])

    for form in ["t5x", "orbax"]:
        with pytest.raises(AssertionError):
            assert_converted(at, leaves, form, tmp_path)
