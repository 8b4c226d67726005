"""fusectl grow: which operators lead to larger sizes, and running the one that is asked for."""

import json

import pytest
from models import checkpoint

from fusectl.cli import run
from fusectl.demo import parameter_shapes
from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.families.recognition import recognize
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.operations.routes import routes
from fusectl.operations.target import read_target
from fusectl.verbs import VERBS
from fusectl.verification import Settings, verify


T5 = "t5-1.1"
# Twice the widths of the tests' T5.
DOUBLE = "emb=24,heads=6,mlp=44"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("small") / "a", T5)


def tree_of(path):
    return recognize(open_checkpoint(str(path)).shapes, str(path))


def possible(path, to):
    tree = tree_of(path)
    return [route.how for route in routes(tree, read_target(to, tree), str(path)) if not route.why_not]


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        (DOUBLE, ["self-fuse", "duplicate", "ligo"]),
        (DOUBLE + ",layers=6", ["self-fuse", "duplicate", "ligo"]),
        ("emb=18,heads=4,mlp=30", ["duplicate", "ligo"]),
        ("emb=24,heads=6,mlp=22", ["duplicate", "ligo"]),
        ("encoder_layers=5", ["stack", "duplicate", "ligo"]),
    ],
)
def test_operators_that_lead_there_come_first_and_the_others_say_why_not(small, to, expected):
    assert possible(small, to) == expected
    tree = tree_of(small)
    found = routes(tree, read_target(to, tree), small)
    assert sorted(route.how for route in found) == sorted(way for verb in VERBS.values() for way in verb.routes)
    assert all(bool(route.steps) != bool(route.why_not) for route in found)


@pytest.mark.slow
def test_every_command_that_is_named_writes_the_sizes_that_were_asked_for(small, tmp_path, capsys):
    to = DOUBLE + ",decoder_layers=1"
    for how in ("self-fuse", "duplicate"):
        out = tmp_path / how
        assert run(["grow", small, "--to", to, "--how", how, "-o", str(out), "-q"]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        sizes = tree_of(out).sizes
        assert (sizes["embed"], sizes["heads"], sizes["mlp"], sizes["joined_kv"]) == (24, 6, 44, 30)
        report = verify(str(out), settings=Settings(levels=("files", "weights", "native")))
        assert report.passed
        assert report.native.passed
    out = tmp_path / "stack"
    assert run(["grow", small, "--to", "layers=6", "--how", "stack", "-o", str(out), "-q"]) == 0
    assert tree_of(out).depths == {"encoder": 6, "decoder": 6}


def test_a_target_is_a_config_or_another_checkpoint_too(small, tmp_path):
    larger = checkpoint(
        tmp_path / "larger",
        T5,
        sizes={"vocab": 41, "embed": 24, "heads": 6, "kv": 5, "joined_kv": 30, "mlp": 44, "relpos_buckets": 32},
    )
    wanted = {"embed": 24, "heads": 6, "mlp": 44}
    tree = tree_of(small)
    assert read_target(larger, tree).sizes == wanted
    gin = tmp_path / "large.gin"
    gin.write_text("network.T5Config.emb_dim = 24\nnetwork.T5Config:\n  num_heads = 6  # more\n  mlp_dim = 44\n")
    assert read_target(str(gin), tree).sizes == wanted
    decoder = checkpoint(tmp_path / "decoder", "maxtext-llama", format="orbax")
    config = tmp_path / "large.yml"
    config.write_text(
        "base_emb_dim: 24\nbase_num_query_heads: 12\nbase_num_kv_heads: 6\nbase_mlp_dim: 44\n"
        "base_num_decoder_layers: 6\nhead_dim: 4\nvocab_size: 41\n"
    )
    target = read_target(str(config), tree_of(decoder))
    assert target.sizes == {"embed": 24, "heads": 12, "kv_heads": 6, "mlp": 44}
    assert target.depths == {"decoder": 6}


@pytest.mark.parametrize(
    ("to", "error", "says"),
    [
        ("emb=8", Incompatible, "never shrink"),
        ("head_dim=8", Incompatible, "heads keep their features"),
        ("vocab=50", Incompatible, "tokens are not mapped"),
        ("emb=12", UsageError, "as large as that already"),
        ("layers=1", Incompatible, "layers are added"),
        ("width=24", UsageError, "NAME=N"),
        ("emb=many", UsageError, "NAME=N"),
        ("kv_heads=6", Incompatible, "no axis kv_heads"),
        ("nowhere.gin", NotFound, "no config"),
    ],
)
def test_targets_that_make_no_sense(small, to, error, says):
    with pytest.raises(error) as caught:
        possible(small, to)
    assert says in " ".join([caught.value.message, *caught.value.details])


def test_a_gin_file_without_sizes_is_refused(small, tmp_path):
    (tmp_path / "other.gin").write_text("train.steps = 100\n")
    with pytest.raises(UsageError, match="none of the sizes"):
        read_target(str(tmp_path / "other.gin"), tree_of(small))


def test_the_command_line_tells_all_routes_and_runs_none_without_how(small, tmp_path, capsys):
    assert run(["grow", small, "--to", DOUBLE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]["routes"]
    assert [route["how"] for route in found if route["command"]] == ["self-fuse", "duplicate", "ligo"]
    assert found[0]["command"] == f"fusectl self-fuse {small} --copies 2 --fill antisymmetric"
    assert run(["grow", small, "--to", DOUBLE]) == 0
    assert "not here: widths change" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--to", DOUBLE, "--how", "stack"], 6),
        (["--to", DOUBLE + ",layers=6", "--how", "self-fuse"], 2),
        (["--to", DOUBLE, "--how", "ligo"], 2),
        ([], 2),
    ],
)
def test_what_cannot_be_run_is_refused(small, words, code, capsys):
    assert run(["grow", small, *words]) == code
    assert "error:" in capsys.readouterr().err


HEADLESS = """
name = "mlp"
[[row]]
path = "embedder/embedding"
axes = "vocab -> embed"
[[row]]
path = "blocks_#/up/kernel"
axes = "embed -> mlp"
[[row]]
path = "blocks_#/down/kernel"
axes = "mlp -> embed"
[[row]]
path = "head/kernel"
axes = "embed -> vocab"
"""


def test_a_model_without_heads_has_a_target(tmp_path):
    (tmp_path / "mlp.toml").write_text(HEADLESS)
    family = family_named(str(tmp_path / "mlp.toml"))
    shapes = {name: shape for name, _, shape in parameter_shapes(family, {"vocab": 11, "embed": 4, "mlp": 6}, {})}
    tree = recognize(shapes, "small", family)

    assert read_target("emb=8,mlp=12", tree).sizes == {"embed": 8, "mlp": 12}
    with pytest.raises(Incompatible, match="sizes that growing keeps"):
        read_target("vocab=12", tree)
