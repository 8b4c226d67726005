"""gin's statements as gin's own parser reads them, and what is wrong with a file."""

import io
import os

import pytest
from gin import config_parser

from fusectl.errors import NotFound, UsageError
from fusectl.restart.ginfile import literal, read_gin


ODD = """\
# A comment
from __gin__ import dynamic_registration
import seqio  # another
import a.b.c as d
NUMBER = -3
train/utils.DatasetConfig:
  # of a block

  split = "train"   # "quoted" # twice
  sizes = {'inputs': 512,
           'targets': 1_14}

  names = ('gelu',  # first
           'lin' 'ear',
  )
  nested = [(1, 2.5e-3), [], None, True]
a/b/module.function.value = @scope/x.y.Class()
module.function.other = [@f, @g.h(), %MACRO, %gin.REQUIRED]
text = '''two
lines # and no comment'''
single:
    x = %NUMBER
"""


class _Names(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f"@{scoped_configurable_name}{'()' * evaluate}"

    def macro(self, macro_name):
        return f"%{macro_name}"


def by_gin(text):
    """The bindings as gin's own parser has them, a macro's name as that of its parameter."""
    statements = config_parser.ConfigParser(io.StringIO(text), _Names())
    for each in statements:
        if isinstance(each, config_parser.BindingStatement):
            scope = tuple(each.scope.split("/")) if each.scope else ()
            yield scope, each.selector * bool(each.arg_name), each.arg_name or each.selector, each.value


def test_statements_are_those_of_gins_own_parser(tmp_path):
    (tmp_path / "odd.gin").write_text(ODD)

    found = read_gin([str(tmp_path / "odd.gin")])

    wanted = list(by_gin(ODD))
    assert len(wanted) == 9
    assert [(b.scope, b.selector, b.parameter) for b in found.bindings] == [each[:3] for each in wanted]
    for binding, each in zip(found.bindings, wanted):
        if "@" in binding.value or "%" in binding.value:
            # The text, which gin reads as the same.
            assert next(by_gin(f"x = {binding.value}"))[3] == each[3]
        else:
            assert literal(binding.value) == each[3]
    assert found.imports["d"] == "import a.b.c as d"
    assert found.imports["dynamic_registration"] == "from __gin__ import dynamic_registration"


def test_includes_are_read_in_their_place(tmp_path, monkeypatch):
    """From where T5X is run, or a directory above; what comes later overrides."""
    (tmp_path / "t5x/models").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "t5x/models/base.gin").write_text("T5Config:\n  dtype = 'bfloat16'\n  dropout_rate = 0.1\n")
    small = tmp_path / "t5x/models/small.gin"
    small.write_text(
        "T5Config.dropout_rate = 0.3\ninclude 't5x/models/base.gin'\nT5Config.vocab_size = %gin.REQUIRED\n"
    )
    wanted = {"dtype": "'bfloat16'", "dropout_rate": "0.1"}

    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_gin([str(small)]).config() == wanted
    mine = tmp_path / "elsewhere/mine.gin"
    mine.write_text("include 'models/base.gin'\nT5Config.dtype = 'float32'\n")
    with pytest.raises(NotFound, match=r"mine.gin: it includes models/base.gin, which is not there"):
        read_gin([str(mine)])
    monkeypatch.chdir(tmp_path / "t5x")
    assert read_gin([str(mine)]).config() == {**wanted, "dtype": "'float32'"}
    assert read_gin([str(mine), str(small)]).config() == wanted


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("", {"dtype": "1", "x": "2"}),
        ("n.Transformer.config = @n.T5Config()", {"dtype": "1", "x": "2"}),
        ("n.Transformer.config = @a/n.T5Config()", {"dtype": "3", "x": "2"}),
        ("n.Transformer.config = @a/b/n.T5Config()", {"dtype": "4", "x": "2"}),
        ("Transformer.config = @m.Mine()\nTransformer.config = @m.MyConfig()", {"dtype": "5"}),
        ("n.Transformer.config = @t5_flax.with_norm_groups()", {"dtype": "1", "x": "2"}),
    ],
)
def test_the_config_is_the_transformers(tmp_path, reference, wanted):
    own = (
        "a/b/n.T5Config.dtype = 4\na/n.T5Config.dtype = 3\nn.T5Config.dtype = 1\nT5Config.x = 2\nm.MyConfig.dtype = 5\n"
    )
    (tmp_path / "a.gin").write_text(own + reference + "\n")

    assert read_gin([str(tmp_path / "a.gin")]).config() == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("network.T5Config\n", "line 1: neither `=` nor `:`"),
        ("x = 1\n\n? = 2\n", "line 3"),
        ("x =\n", "line 1"),
        ("x = (1,\n", "EOF"),
        ("T5Config:\n    x = 1\n  y = 2\n", "indent"),
        ("x = " + "(" * 500 + "\n", ""),
        ("include 'itself.gin'\n", "more gin than a model has"),
        ("x = 1\n" * 200_000, "more gin than a model has"),
        ("x = \0\n", ""),
    ],
)
def test_what_is_no_gin_is_refused(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "itself.gin").write_text(text)

    with pytest.raises(UsageError) as caught:
        read_gin(["itself.gin"])

    assert said in " ".join([caught.value.message, *caught.value.details])


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gin")
    for name in ("pipe.gin", "absent.gin", ""):
        with pytest.raises(NotFound, match="no such gin file"):
            read_gin([str(tmp_path / name)])
    (tmp_path / "a.gin").write_text(f"include '{tmp_path}/pipe.gin'\n")
    with pytest.raises(NotFound, match="which is not there"):
        read_gin([str(tmp_path / "a.gin")])
    (tmp_path / "a.gin").write_bytes(b"x = '\xff'\n")
    with pytest.raises(UsageError, match="not gin"):
        read_gin([str(tmp_path / "a.gin")])
