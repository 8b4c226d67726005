"""A family of one's own as a TOML file: what it is read to, its mistakes, and the commands with it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from models import SIZES, WIDER_DECODER, checkpoint, contents, sizes_of, state, write_record

from fusectl.errors import UsageError
from fusectl.families.registry import FAMILIES, family_named
from fusectl.families.roles import ROLES
from fusectl.families.settings import ACTIVATIONS, Network
from fusectl.families.table import Row
from fusectl.families.userfile import ATTENDING, BIAS, NETWORK, ROW, TWIN, parse_family
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.networks import decoder_flax


LLAMA = """\
name = "llama-by-hand"

[network]
norm_epsilon = 1e-5

[[row]]
path = "token_embedder/embedding"
axes = "vocab -> embed"
role = "embedding"

[[row]]
path = "decoder/layers_#/{pre,post}_self_attention_layer_norm/scale"
axes = "-> embed"
role = "pre_attention_norm pre_mlp_norm"

[[row]]
path = "decoder/layers_#/self_attention/query/kernel"
axes = "embed -> heads kv"
role = "query"

[[row]]
path = "decoder/layers_#/self_attention/{key,value}/kernel"
axes = "embed -> kv_heads kv"
role = "key value"

[[row]]
path = "decoder/layers_#/self_attention/out/kernel"
axes = "heads kv -> embed"
role = "out"

[[row]]
path = "decoder/layers_#/mlp/{wi_0,wi_1}/kernel"
axes = "embed -> mlp"
role = "gate up"

[[row]]
path = "decoder/layers_#/mlp/wo/kernel"
axes = "mlp -> embed"
role = "down"

[[row]]
path = "decoder/decoder_norm/scale"
axes = "-> embed"
role = "final_norm"

[[row]]
path = "decoder/logits_dense/kernel"
axes = "embed -> vocab"
role = "head"
"""
WITHOUT_ROLES = "\n".join(line for line in LLAMA.splitlines() if not line.startswith("role"))


@pytest.fixture
def table(tmp_path) -> Path:
    (tmp_path / "llama.toml").write_text(LLAMA)
    return tmp_path / "llama.toml"


@pytest.fixture
def plain(tmp_path) -> Path:
    """The same without roles."""
    (tmp_path / "plain.toml").write_text(WITHOUT_ROLES)
    return tmp_path / "plain.toml"


@pytest.fixture
def models(tmp_path) -> list[str]:
    one = checkpoint(tmp_path / "a", "maxtext-llama", 0, format="orbax")
    return [one, checkpoint(tmp_path / "b", "maxtext-llama", 1, sizes=WIDER_DECODER, format="orbax")]


def mistakes(text) -> tuple[str, ...]:
    with pytest.raises(UsageError) as error:
        parse_family(text, "my.toml", {"t5-1.1"})
    return error.value.details


# What it is read to.


def grown_of(family) -> set[str]:
    """The axes that grow and that a row has; tables share their sets of them."""
    return {axis for row in family.rows for axis in row.spec.axes} & family.grown


def as_toml(family) -> str:
    """A family's table as somebody would write it who leaves out what follows from the rest."""
    lines = ['name = "by-hand"', f"grown = {json.dumps(sorted(grown_of(family)))}", "[network]"]
    network = family.network({**sizes_of(family), "layers": 3})
    for key in NETWORK:
        value = getattr(network, key)
        if key == "attending":
            inline = (
                ", ".join(f"{k} = {v}" for k, v in dataclasses.asdict(each).items() if v is not None) for each in value
            )
            lines.append(f"attending = [{', '.join(f'{{{each}}}' for each in inline)}]")
        elif value is not None and (key != "tied_logits_power" or family.tied):
            lines.append(f"{key} = {json.dumps(value)}")
    for row in family.rows:
        lines += ["[[row]]", f'path = "{row.pattern}"', f'axes = "{row.axes}"']
        lines += [f'role = "{row.role}"'] if row.role else []
        lines += ["before_head = true"] if row.before_head and not row.role else []
        lines += [f"every = {row.every}", f"first = {row.first}"] if row.every > 1 else []
        lines += ["optional = true"] if row.optional else []
    return "\n".join(lines)


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if not any(row.behind for row in f.rows)])
def test_every_family_can_be_written_as_a_file(name):
    family = family_named(name)
    if family.trainer == "t5x":
        # A file has the roles of decoders.
        family = dataclasses.replace(family, rows=tuple(dataclasses.replace(row, role="") for row in family.rows))

    found = parse_family(as_toml(family), "my.toml")

    def same(row):
        return row.pattern, row.axes, row.role, row.before_head, row.writes_stream, row.every, row.first, row.optional

    assert list(map(same, found.rows)) == list(map(same, family.rows))
    assert found.grown == grown_of(family)
    expected = family.network({**sizes_of(family), "layers": 3})
    if not family.tied:
        expected = dataclasses.replace(expected, tied_logits_power=0.0)
    assert found.network({}) == expected
    assert (found.twin, found.trainer) == (None if family.trainer == "t5x" else TWIN, "")


def test_the_keys_are_the_fields_of_what_they_are_read_to():
    fields = {field.name for field in dataclasses.fields(Network)}

    assert NETWORK.keys() == fields - {"told"}
    assert {"pattern" if key == "path" else key for key in ROW} == {f.name for f in dataclasses.fields(Row)} - {
        "behind"
    }
    assert set(ACTIVATIONS) == decoder_flax.ACTIVATIONS.keys()


@pytest.mark.slow
def test_the_readmes_example_is_a_whole_decoder(tmp_path, fusectl):
    text = (Path(__file__).parents[2] / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "my.toml").write_text(text)
    source = checkpoint(tmp_path / "small", str(tmp_path / "my.toml"), format="orbax")

    done = fusectl("self-fuse", source, "-o", tmp_path / "own", "--arch", tmp_path / "my.toml", "--verify", "--json")

    assert done.code == 0, done.err
    assert done.json["result"]["verification"]["algebra"]["passed"]


def test_every_key_and_role_is_documented():
    readme = (Path(__file__).parents[2] / "README.md").read_text()

    for word in ("name", "grown", *ROW, *NETWORK, *ATTENDING, *ROLES, BIAS):
        assert f"`{word}`" in readme, word


def test_grown_axes_are_those_of_the_rows_by_default():
    assert parse_family(LLAMA, "my.toml").grown == {"embed", "mlp", "heads", "kv_heads"}
    assert "kv_heads" not in parse_family(LLAMA.replace("kv_heads", "heads"), "my.toml").grown


def test_biases_are_added_to_the_stream_and_are_no_norms():
    bias = '\n[[row]]\npath = "decoder/layers_#/mlp/wo/bias"\naxes = "-> embed"\nrole = "bias"\n'

    row = parse_family(LLAMA + bias, "my.toml").rows[-1]

    assert row.writes_stream
    assert not row.is_norm


# Mistakes.

ROW_OF_QUERIES = 'path = "decoder/layers_#/self_attention/query/kernel"'
ROW_OF_DOWN = 'path = "decoder/layers_#/mlp/wo/kernel"'


@pytest.mark.parametrize(
    ("old", "new", "said", "caret"),
    [
        ('name = "llama-by-hand"', 'name = "my llama"', "'my llama' is no name", "my llama"),
        ('name = "llama-by-hand"', 'name = "my.toml"', "'my.toml' is no name", "my.toml"),
        ('name = "llama-by-hand"', 'name = "t5-1.1"', "a family that fusectl knows", "t5-1.1"),
        ('name = "llama-by-hand"', "name = [1]", "name: [1], not a text", "[1]"),
        ('name = "llama-by-hand"', "", "no name of the family", None),
        ("[network]", "[netwrok]", "no key 'netwrok'; did you mean network?", "netwrok"),
        ("norm_epsilon = 1e-5", "norm_epsilom = 1e-5", "did you mean norm_epsilon", "norm_epsilom"),
        ("norm_epsilon = 1e-5", 'norm_epsilon = "small"', "'small', not a positive number", "small"),
        ("norm_epsilon = 1e-5", "norm_epsilon = nan", "not a positive number", "nan"),
        ("norm_epsilon = 1e-5", "norm_epsilon = true", "not a positive number", "true"),
        ("norm_epsilon = 1e-5", "norm_adds_one = 1", "1, not true or false", "1"),
        ("norm_epsilon = 1e-5", 'activation = "gleu"', "did you mean gelu", "gleu"),
        ("norm_epsilon = 1e-5", "attending = [{ widow = 3 }]", "did you mean window", "widow"),
        ("norm_epsilon = 1e-5", "attending = [{ window = 0 }]", "0, not a number of 1 or more", "0"),
        ("norm_epsilon = 1e-5", "attending = [3]", "3, not a table", "["),
        ("norm_epsilon = 1e-5", "attending = []", "no layers attend", "["),
        ("norm_epsilon = 1e-5", "norm_epsilon = 2", "leaves nothing of what is normalised", "norm_epsilon"),
        ("norm_epsilon = 1e-5", "tied_logits_power = -0.5", "of a tied head, and this one is not", "tied"),
        (
            "[network]",
            'grown = ["embed", "hedas"]\n[network]',
            "no row has an axis 'hedas'; did you mean heads",
            "hedas",
        ),
        ("[network]", 'grown = ["embed", "vocab"]\n[network]', "vocab is the same in every source", "vocab"),
        ("[network]", 'grown = ["heads", "kv_heads", "mlp"]\n[network]', "no axis embed that grows", "["),
        ("[network]", 'grown = ["embed", 3]\n[network]', "no row has an axis 3", "["),
        (ROW_OF_QUERIES, 'pth = "x"', "a row without path", "[[row]]"),
        (ROW_OF_QUERIES, 'path = "decoder/{a,b/kernel"', "a brace without its partner", "{a"),
        (ROW_OF_QUERIES, 'path = "decoder/{a,b}/c}"', "a brace without its partner", '}"'),
        (ROW_OF_QUERIES, 'path = "block_#/layers_#/q"', "a second #", '#/q"'),
        (ROW_OF_QUERIES, f'path = "{"{a,b}" * 20}"', "more than 100 names", "{a"),
        (ROW_OF_QUERIES, 'path = "params/q"', "what trainers put in front", "params"),
        (ROW_OF_QUERIES, 'path = "decoder//q"', "an empty or unprintable part", "decoder//"),
        (ROW_OF_QUERIES, ROW_OF_DOWN, "a second time, as in the row at line", "decoder/layers_#/mlp/wo"),
        ('"embed -> heads kv"', '"embed -> Heads kv"', "'Heads' is no axis name", "Heads"),
        ('"embed -> heads kv"', '"embed heads kv"', "no arrow", '"'),
        ('"embed -> heads kv"', '"embed layers -> heads kv"', "one or the other", "#/self_attention/query"),
        (
            '"embed -> heads kv"',
            '"embed -> kv"',
            "role query: of a tensor with the axes embed, heads, kv",
            "embed -> kv",
        ),
        ('role = "query"', 'role = "qeury"', "no role 'qeury'; did you mean query", "qeury"),
        ('role = "query"', 'role = "query key"', "2 roles for 1 name and no axis stack", "query key"),
        ('role = "query"', 'role = "final_norm"', "of one tensor, not one of each layer", "final_norm"),
        ('role = "query"', 'role = "out"', "role out: may be there once, and another row has it", "out"),
        ('role = "key value"', 'role = "key"', "may be there once, and the path stands for 2", "key"),
        ('role = "head"', 'role = "embedding"', "role embedding: may be there once", "embedding"),
        ('role = "query"', "every = 0", "every: 0, not a number of 1 or more", "0"),
        ('role = "query"', "first = 9999999999", "not a number of layers", "9999999999"),
        ('role = "query"', 'optional = "yes"', "'yes', not true or false", "yes"),
        ('role = "query"', "writes = true", "it does not write embed", "embed -> heads"),
        ('role = "query"', "before_head = true", "before_head: of one tensor that is always there", "decoder/layers_#"),
        ('"mlp -> embed"\nrole = "down"', '"stack mlp -> embed"', "no roles of the kernels along it", "stack"),
        ('"embed -> mlp"\nrole = "gate up"', '"embed -> ffn"', "writes ffn, which does not", "embed -> ffn"),
        ('"embed -> vocab"\nrole = "head"', '"embed -> classes"', "writes classes, which does not", "embed -> classes"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_a_caret(old, new, said, caret):
    assert LLAMA.count(old) >= 1
    text = LLAMA.replace(old, new, 1)

    details = mistakes(text)

    (detail,) = [each for each in details if said in each]
    if caret is None:
        assert "\n" not in detail
        return
    told, shown, pointer = detail.splitlines()
    number = int(told.split(":")[0].removeprefix("line "))
    line = text.splitlines()[number - 1]
    assert shown == f"  {line}"
    assert line[pointer.index("^") - 2 :].startswith(caret)


def test_the_row_that_has_a_name_already_is_told():
    text = LLAMA.replace(ROW_OF_QUERIES, ROW_OF_DOWN, 1)
    earlier, later = (i + 1 for i, line in enumerate(text.splitlines()) if line == ROW_OF_DOWN)

    (detail,) = mistakes(text)

    # The row begins with its header, above the path.
    said = f"line {later}: decoder/layers_#/mlp/wo/kernel a second time, as in the row at line {earlier - 1}"
    assert detail.startswith(said)


def test_a_family_needs_a_head():
    headless = LLAMA[: LLAMA.index('[[row]]\npath = "decoder/decoder_norm')]
    (detail,) = mistakes(headless)
    assert "no head" in detail

    norm = '\n[[row]]\npath = "decoder/decoder_norm/scale"\naxes = "-> embed"\n'
    assert "no head" in mistakes(headless + norm)[0]
    assert parse_family(headless + norm + 'role = "final_norm"', "my.toml").tied
    assert parse_family(headless + norm + "before_head = true", "my.toml").tied
    assert not parse_family(LLAMA, "my.toml").tied


def test_layers_that_two_rows_are_about_may_not_meet():
    row = '[[row]]\npath = "decoder/{}/wq"\naxes = "embed -> heads kv"\nrole = "query"\n{}\n'

    def of(one, other):
        text = LLAMA.replace('role = "query"', "", 1)
        return text + row.format("local_#", one) + row.format("global_#", other)

    parse_family(of("every = 2", "every = 2\nfirst = 1"), "my.toml")
    assert "role query" in mistakes(of("every = 2", "every = 2\nfirst = 2"))[0]
    assert "role query" in mistakes(of("every = 2", "every = 3\nfirst = 1"))[0]
    single = of("first = 1", "every = 2").replace("local_#", "local_1")
    parse_family(single, "my.toml")
    assert "role query" in mistakes(single.replace("first = 1", "first = 4"))[0]
    # Layer 2 comes before layers 4, 6, …
    parse_family(single.replace("first = 1", "first = 2").replace("every = 2", "every = 2\nfirst = 4"), "my.toml")


def test_all_mistakes_of_a_file_are_told_at_once_in_the_order_of_its_lines(tmp_path, models, fusectl):
    text = LLAMA.replace("1e-5", '"small"').replace("heads kv ->", "heads kv").replace('"down"', '"don"')
    (tmp_path / "my.toml").write_text(f"colour = 3\n{text}")

    done = fusectl("fuse", *models, "--arch", tmp_path / "my.toml")

    assert done.code == 2
    assert "4 mistakes in the table of a family" in done.err
    told = [line.split(":")[1].strip() for line in done.err.splitlines() if line.startswith("  line ")]
    assert told[:3] == ["the file has no key 'colour'; known", "norm_epsilon", "no arrow"]
    assert told[3].startswith("there is no role 'don'; did you mean down")
    caret = next(line for line in done.err.splitlines() if set(line) == {" ", "^"})
    assert caret == "    ^"


@pytest.mark.parametrize(
    ("text", "said", "place"),
    [
        ('name = "x"\ngrown = [1,\n\n[[row]\n', "line ", None),
        ("name = x\n", "line 1: Invalid value", "x"),
        ('a = 1\na = "twice"\n', "line 2: Cannot overwrite a value", None),
        ("a = " + "[" * 100_000, "", None),
        ("a = " + "1" * 5000, "", None),
    ],
)
def test_what_is_no_toml_is_shown_with_a_caret(text, said, place):
    with pytest.raises(UsageError, match="my.toml: not TOML") as error:
        parse_family(text, "my.toml")

    (detail,) = error.value.details
    assert detail.startswith(said)
    if place is not None:
        _, line, pointer = detail.splitlines()
        assert line[pointer.index("^") :].startswith(place)


def test_files_that_are_none(tmp_path, models, fusectl):
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    (tmp_path / "large.toml").write_text("#" * (1 << 18 | 1))
    (tmp_path / "directory.toml").mkdir()

    def code(name):
        return fusectl("self-fuse", models[0], "--arch", tmp_path / name, "--dry-run").code

    assert [code(name) for name in ("latin.toml", "large.toml", "directory.toml", "nothing.toml")] == [2, 2, 4, 4]


# Commands.


@pytest.mark.slow
def test_a_family_that_fusectl_knows_fuses_to_the_same_bytes_from_a_file(table, models, tmp_path, fusectl):
    noise = ["--fill", "gaussian", "--seed", "3"]
    known = fusectl("fuse", *models, "-o", tmp_path / "known", *noise)
    own = fusectl("fuse", *models, "-o", tmp_path / "own", "--arch", table, *noise)
    assert (known.code, own.code) == (0, 0)

    assert contents(tmp_path / "own") == contents(tmp_path / "known")

    found = fusectl("verify", tmp_path / "own", "--x64", "--json").json["result"]
    assert found["passed"]
    assert found["weights"]["passed"]
    assert found["algebra"]["max_abs"] < 1e-12
    assert found["native"]["max_abs"] > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxtext-gemma2-tied-scanned", "gemma3-qkv"])
def test_stacks_groups_of_layers_and_before_heads_are_those_of_the_families_here(name, tmp_path, fusectl):
    (tmp_path / "my.toml").write_text(as_toml(family_named(name)))
    source = checkpoint(tmp_path / "a", name, format="orbax")
    for at, arch in (("known", name), ("own", tmp_path / "my.toml")):
        done = fusectl("self-fuse", source, "-k", "3", "-o", tmp_path / at, "--arch", arch, "--fill", "gaussian")
        assert done.code == 0, done.err

    assert contents(tmp_path / "own") == contents(tmp_path / "known")
    found = fusectl("verify", tmp_path / "own", "--levels", "algebra", "--json").json["result"]
    assert found["algebra"]["passed"]


@pytest.mark.slow
def test_a_checkpoint_that_was_written_with_a_file_needs_it_no_more(table, models, tmp_path, fusectl):
    assert fusectl("fuse", *models, "-o", tmp_path / "own", "--arch", table).code == 0
    table.unlink()

    verified = fusectl("verify", tmp_path / "own", "--json")
    assert verified.json["result"]["algebra"]["passed"]
    assert fusectl("inspect", tmp_path / "own", "--json").json["result"]["family"] == "llama-by-hand"
    assert fusectl("inspect", tmp_path / "own", "--fsck").code == 0
    filled = fusectl("noise-fill", tmp_path / "own", "-o", tmp_path / "filled", "--verify")
    assert filled.code == 0, filled.err
    copied = fusectl("convert", tmp_path / "filled", "--format", "t5x", "--dtype", "float64", "-o", tmp_path / "copied")
    assert copied.code == 0, copied.err
    assert fusectl("verify", tmp_path / "copied").code == 0
    tensor = "decoder/layers_0/mlp/wi_0/kernel"
    assert fusectl("plot", tmp_path / "copied", "--tensor", tensor, "-o", tmp_path / "wi.png").code == 0
    again = fusectl("self-fuse", tmp_path / "copied", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    for name in ("own", "filled", "copied", "again"):
        record = json.loads((tmp_path / name / "fusectl.json").read_text())
        assert (record["family"], record["table"]) == ("llama-by-hand", LLAMA), name
    assert fusectl("restart-config", tmp_path / "own").code == 6


def test_a_fusion_without_a_record_gets_the_table_when_it_is_filled(table, models, tmp_path, fusectl):
    assert fusectl("self-fuse", models[0], "-o", tmp_path / "own", "--arch", table).code == 0
    (tmp_path / "own" / "fusectl.json").unlink()

    filled = ["-k", "2", "-o", tmp_path / "filled", "--arch", table]
    assert fusectl("noise-fill", tmp_path / "own", *filled).code == 0

    assert json.loads((tmp_path / "filled" / "fusectl.json").read_text())["table"] == LLAMA


def test_a_family_that_fusectl_knows_leaves_no_table_in_the_record(models, tmp_path, fusectl):
    assert fusectl("self-fuse", models[0], "-o", tmp_path / "known").code == 0

    assert json.loads((tmp_path / "known" / "fusectl.json").read_text())["table"] is None


@pytest.mark.parametrize(
    ("spoilt", "said"), [(3, "is no text"), ("x" * (1 << 18 | 1), "262,145"), ("[", "cannot be read")]
)
def test_a_table_in_a_record_is_not_trusted(table, models, tmp_path, fusectl, spoilt, said):
    assert fusectl("self-fuse", models[0], "-o", tmp_path / "own", "--arch", table).code == 0
    record = json.loads((tmp_path / "own" / "fusectl.json").read_text())
    write_record(tmp_path / "own", {**record, "table": spoilt})

    done = fusectl("noise-fill", tmp_path / "own", "-o", tmp_path / "filled")

    assert done.code == 5
    assert said in done.err


def test_two_tables_of_one_name_do_not_fit_together(table, models, tmp_path, fusectl):
    assert fusectl("self-fuse", models[0], "-o", tmp_path / "one", "--arch", table).code == 0
    table.write_text(LLAMA.replace("embed -> heads kv", "embed -> heads kv").replace('role = "out"', ""))
    assert fusectl("self-fuse", models[1], "-o", tmp_path / "other", "--arch", table).code == 0

    done = fusectl("fuse", tmp_path / "one", tmp_path / "other", "-o", tmp_path / "both")

    assert done.code == 6
    assert "llama-by-hand: another table in" in done.err


@pytest.mark.slow
def test_adams_moments_go_along(table, tmp_path, fusectl):
    parameters = state(str(table), 0)
    tree = {f"params/{name}": values for name, values in parameters.items()}
    for moment in ("mu", "nu"):
        tree |= {f"opt_state/0/{moment}/{name}": np.abs(values) for name, values in parameters.items()}
    save(tmp_path / "a", {**tree, "opt_state/0/count": np.array(7, np.int32)}, "orbax")

    done = fusectl("self-fuse", tmp_path / "a", "-o", tmp_path / "own", "--arch", table, "--verify", "--json")

    assert done.code == 0, done.err
    assert done.json["result"]["verification"]["weights"]["slots"] == 2 * len(parameters) + 1


def test_inspect_shows_which_row_took_which_tensor(table, models, fusectl):
    shown = fusectl("inspect", models[0], "--arch", table)
    assert shown.code == 0
    line = next(line for line in shown.out.splitlines() if "layers_1/self_attention/query/kernel" in line)
    assert line.split()[-1] == "decoder/layers_#/self_attention/query/kernel"
    assert "because      the table in" in shown.out
    assert " row\n" not in fusectl("inspect", models[0]).out

    for arch in ([], ["--arch", "maxtext-llama"], ["--arch", table]):
        found = fusectl("inspect", models[0], "--json", *arch).json["result"]["tensors"]
        rows = {tensor["name"]: tensor["row"] for tensor in found}
        assert rows["params/params/decoder/layers_1/mlp/wo/kernel"] == "decoder/layers_#/mlp/wo/kernel"
        assert None not in rows.values()


def test_inspect_shows_what_a_table_leaves_over(table, models, fusectl):
    table.write_text(LLAMA.replace("self_attention/query", "self_attention/querry").replace("-> vocab", "vocab ->"))
    assert fusectl("inspect", models[0], "--arch", table).code == 2
    table.write_text(LLAMA.replace("self_attention/query", "self_attention/querry"))

    shown = fusectl("inspect", models[0], "--arch", table)

    assert shown.code == 6
    assert "does not have the tree of llama-by-hand" in shown.err
    assert (
        "decoder/layers_0/self_attention/querry/kernel: missing"
        in fusectl("inspect", models[0], "--arch", table, "--json").json["error"]["details"]
    )
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line.startswith("params/params/")}
    line = lines["params/params/decoder/layers_1/self_attention/query/kernel"]
    assert line.endswith("none; nearest: decoder/layers_#/self_attention/querry/kernel")
    line = lines["params/params/decoder/layers_1/mlp/wo/kernel"]
    assert line.endswith("decoder/layers_#/mlp/wo/kernel")
    found = fusectl("inspect", models[0], "--arch", table, "--json").json["result"]["tensors"]
    lost = [tensor for tensor in found if tensor["row"] is None]
    assert len(lost) == 2
    assert {tensor["nearest_row"] for tensor in lost} == {"decoder/layers_#/self_attention/querry/kernel"}


def test_inspect_still_refuses_families_that_do_not_exist(models, fusectl):
    done = fusectl("inspect", models[0], "--arch", "maxtext-lama")

    assert done.code == 6
    assert done.out == ""
    assert "maxtext-llama" in done.err


@pytest.mark.slow
def test_a_family_without_roles_is_proved_as_far_as_it_can_be(plain, models, tmp_path, fusectl):
    written = fusectl("fuse", *models, "-o", tmp_path / "own", "--arch", plain, "--verify")
    assert written.code == 0, written.err
    assert "algebra and native were not run" in written.err
    proof = json.loads((tmp_path / "own" / "fusectl-verify.json").read_text())
    assert proof["weights"]["passed"]
    assert proof["algebra"] is None
    assert proof["native"] is None
    assert any("rows without a role" in note for note in proof["notes"])

    assert fusectl("verify", tmp_path / "own", "--levels", "files,weights").code == 0
    for asked in (["--levels", "algebra"], ["--levels", "weights,native"], ["--trace"], ["--max-native-rms", "9"]):
        done = fusectl("verify", tmp_path / "own", *asked)
        assert done.code == 6, asked
        assert "no network to run" in done.err
        assert "rows without a role" in done.err
        assert "passed" not in done.out


def test_streams_of_a_family_without_roles_are_measured_by_weights_only(plain, models, tmp_path, fusectl):
    by_trace = fusectl("fuse", *models, "-o", tmp_path / "own", "--arch", plain, "--equalize")
    assert by_trace.code == 6
    assert "--equalize-by weights" in by_trace.err

    by_weights = ["--equalize", "--equalize-by", "weights"]
    assert fusectl("fuse", *models, "-o", tmp_path / "own", "--arch", plain, *by_weights, "--verify").code == 0


def test_layers_that_are_not_alike_are_not_run(table, models, tmp_path, fusectl):
    # Only every other layer would have a gate.
    up = LLAMA.replace("{wi_0,wi_1}", "wi_1").replace('role = "gate up"', 'role = "up"')
    gate = '\n[[row]]\npath = "decoder/layers_#/mlp/wi_0/kernel"\naxes = "embed -> mlp"\nrole = "gate"\nevery = 2\n'
    table.write_text(up + gate)

    done = fusectl("self-fuse", models[0], "-o", tmp_path / "own", "--arch", table, "--verify")

    assert done.code == 6
    assert "layer 1: no tensors with the role gate" in done.err
    assert not (tmp_path / "own").exists()


def test_stacked_layers_of_a_file_have_no_other_layout(table, models, tmp_path, fusectl):
    done = fusectl("convert", models[0], "-o", tmp_path / "c", "--scan", "--arch", table)

    assert done.code == 6
    assert "has one layout of its layers only" in done.err


def test_axes_that_t5_joins_grow_where_they_are_said_to(tmp_path, fusectl):
    text = LLAMA.replace("heads kv", "joined_kv").replace("kv_joined_kv", "joined_kv")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("role"))
    text = text.replace("[network]", 'grown = ["embed", "joined_kv", "mlp"]\n[network]')
    (tmp_path / "joined.toml").write_text(text)
    source = checkpoint(
        tmp_path / "a", str(tmp_path / "joined.toml"), sizes=SIZES, layers={"decoder": 2}, format="orbax"
    )

    done = fusectl("self-fuse", source, "-o", tmp_path / "own", "--arch", tmp_path / "joined.toml", "--verify")

    assert done.code == 0, done.err


def test_a_table_of_absurd_size_is_refused_at_once():
    many = "\n".join(f'{{path = "{"{a,b}" * 6}{i % 7}", axes = "-> embed"}},' for i in range(1000))

    assert "1,001 rows" in mistakes('name = "x"\n' + '[[row]]\npath = "a"\naxes = "-> embed"\n' * 1001)[0]
    assert len(mistakes(f'name = "x"\nrow = [\n{many}\n]')) == 21


def test_rows_in_one_list_are_told_by_their_lines():
    text = 'name = "x"\nrow = [\n  { path = "a", axes = "vocab -> embed" },\n  { path = "b", axes = "embed vocab" },\n]'

    (detail,) = mistakes(text)

    assert detail.splitlines()[0].startswith("line 4: no arrow")


GPT = """
name = "tiny-gpt"
[[row]]
path = "wte/embedding"
axes = "vocab -> embed"
role = "embedding"
[[row]]
path = "h_#/mlp/c_fc/kernel"
axes = "embed -> mlp"
[[row]]
path = "h_#/mlp/c_proj/kernel"
axes = "mlp -> embed"
[[row]]
path = "ln_f/scale"
axes = "-> embed"
SCALE
[[row]]
path = "ln_f/bias"
axes = "-> embed"
BIAS
"""


def gpt(scale, bias):
    return GPT.replace("SCALE", scale).replace("BIAS", bias)


def gpt_logits(path):
    """Of a network with one LayerNorm, which has a bias, before a head that is the embedding; in float64."""
    opened = open_checkpoint(str(path))
    names = ("wte/embedding", "h_0/mlp/c_fc/kernel", "h_0/mlp/c_proj/kernel", "ln_f/scale", "ln_f/bias")
    embedding, up, down, scale, bias = (opened.read(f"params/{name}").astype(float) for name in names)
    x = embedding + np.maximum(embedding @ up, 0) @ down
    return ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * scale + bias) @ embedding.T


@pytest.fixture
def small_gpt(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"wte/embedding": (9, 4), "h_0/mlp/c_fc/kernel": (4, 6), "h_0/mlp/c_proj/kernel": (6, 4)}
    shapes |= {"ln_f/scale": (4,), "ln_f/bias": (4,)}
    save(tmp_path / "small/1", {f"params/{name}": rng.normal(size=shape) for name, shape in shapes.items()}, "orbax")
    return tmp_path / "small/1"


@pytest.mark.parametrize(
    ("scale", "bias"),
    [
        ('role = "final_norm"', 'role = "final_norm_bias"'),
        ("before_head = true", 'role = "final_norm_bias"'),
        ("before_head = true", 'role = "bias"\nbefore_head = true\nwrites = false'),
    ],
)
def test_the_bias_of_the_norm_before_a_tied_head_carries_the_factor(small_gpt, tmp_path, fusectl, scale, bias):
    (tmp_path / "gpt.toml").write_text(gpt(scale, bias))

    done = fusectl("self-fuse", small_gpt, "--arch", tmp_path / "gpt.toml", "-o", tmp_path / "wide/1", "--verify")

    assert done.code == 0, done.err
    assert np.abs(gpt_logits(tmp_path / "wide/1") - gpt_logits(small_gpt)).max() < 1e-13
    checked = fusectl("verify", tmp_path / "wide/1")
    assert checked.out.endswith("passed: files and weights; the function was not checked\n")
    report = fusectl("verify", tmp_path / "wide/1", "--json").json["result"]
    assert (report["passed"], report["function_checked"]) == (True, False)


@pytest.mark.parametrize(
    ("scale", "bias", "says"),
    [
        # Fused with the first two of these, the logits were off by 3.15, and verify had nothing to say.
        ('role = "final_norm"', 'role = "bias"\nwrites = false', "added before the head or elsewhere?"),
        ("", 'role = "bias"\nbefore_head = true', "before_head: of no norm"),
        ('role = "final_norm"', "", "added before the head or elsewhere?"),
        # Without a role it may be another norm's scale.
        ('role = "final_norm"', "before_head = true", "of one norm, and another row has it"),
        ("before_head = true", 'role = "final_norm"', "of one norm, and another row has it"),
    ],
)
def test_tables_that_would_split_the_factor_of_a_tied_head_are_refused(scale, bias, says):
    found = mistakes(gpt(scale, bias))

    assert any(says in each for each in found), found


def test_a_bias_that_is_elsewhere_says_so(small_gpt, tmp_path, fusectl):
    table = gpt('role = "final_norm"', 'role = "final_norm_bias"')
    elsewhere = '[[row]]\npath = "ln_e/bias"\naxes = "-> embed"\nrole = "bias"\n'

    assert "added before the head or elsewhere?" in mistakes(table + elsewhere)[0]
    assert parse_family(table + elsewhere + "before_head = false", "gpt.toml").tied
