"""T5X's gin files, as far as they bind a network's config: statements by their text; nothing is imported or called.

    include 't5x/examples/t5/t5_1_1/base.gin'       read in its place
    network.T5Config:                               a block of bindings
      dropout_rate = %DROPOUT_RATE                  kept as it is written: the macro is the run's
    teacher/network.T5Config.dtype = 'bfloat16'     for the config in the scope `teacher` alone

Source: gin/config_parser.py of gin-config 0.5, whose own parser is not used: fusectl does without gin.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusectl.errors import NotFound, UsageError


# The classes that configs are of, T5X's and fusectl's, where no Transformer says which one is its config.
CONFIGS = frozenset({"T5Config", "ScalableT5Config"})
REQUIRED = "%gin.REQUIRED"
# Of all files together, and how deep they may include each other; T5X's own are of a few kilobytes, three deep.
_LARGEST_BYTES = 1 << 20
_DEEPEST = 20
_KEY = re.compile(r"(?:\w+/)*\w+(?:\.\w+)*")
_REFERENCE = re.compile(r"@(?:\w+/)*(\w+)(?:\.\w+)*")
_NO_TEXT = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER})
# What the tokenizer and `literal_eval` may raise for a text from outside.
_MALFORMED = (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Binding:
    """`scope/selector.parameter = value`, the value by its text; a macro has no selector."""

    scope: tuple[str, ...]
    selector: str
    parameter: str
    value: str

    @property
    def configurable(self) -> str:
        """The name of what is configured, without its modules."""
        return self.selector.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class GinFiles:
    """What one or several gin files say, those that they include in their places; later bindings override."""

    where: str
    bindings: tuple[Binding, ...] = field(repr=False)
    # By the names that they bind, the statements that import.
    imports: Mapping[str, str] = field(repr=False)

    def config(self) -> dict[str, str]:
        """The parameters of the config that the Transformer has, each by the text of its value.

        A narrower scope overrides a wider one, as in gin; what is still to be bound (`%gin.REQUIRED`) is left out.
        """
        scope, names = self._reference()
        own = [each for each in self.bindings if each.configurable in names and scope[: len(each.scope)] == each.scope]
        # The sort is stable, so that of two bindings in one scope the later one still wins.
        own.sort(key=lambda each: len(each.scope))
        return {each.parameter: each.value for each in own if each.value != REQUIRED}

    def imports_for(self, value: str) -> list[str]:
        """The statements that import what a value refers to with @."""
        return [self.imports[name] for name in _REFERENCE.findall(value) if name in self.imports]

    def _reference(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """The scope and the possible names of the class of the Transformer's config."""
        values = [b.value for b in self.bindings if (b.configurable, b.parameter) == ("Transformer", "config")]
        found = re.fullmatch(r"@((?:\w+/)*)(?:\w+\.)*(\w+)\(\)", values[-1]) if values else None
        if found is None or not found.group(2).endswith("Config"):
            return (), CONFIGS
        return tuple(found.group(1).split("/")[:-1]), frozenset({found.group(2)})


def read_gin(paths: Sequence[str]) -> GinFiles:
    """The GinFiles at these paths, in the order in which T5X is given them.

    An include is looked for where T5X does, in the current directory and beside the package t5x, if one is installed,
    and above the file that includes it. Raises NotFound for a file that is not there, UsageError for what is no gin.
    """
    reader = _Reader()
    for path in paths:
        if not Path(path).is_file():
            raise NotFound(f"{path}: no such gin file")
        reader.read(Path(path), ())
    return GinFiles(" and ".join(paths), tuple(reader.bindings), reader.imports)


def literal(value: str) -> Any:
    """The value that a text stands for; the text itself where only gin can tell: macros, references."""
    try:
        return ast.literal_eval(value)
    except _MALFORMED:
        return value


class _Reader:
    """Collects the statements of files and of those that they include."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []
        self.imports: dict[str, str] = {}
        self._left_bytes = _LARGEST_BYTES

    def read(self, path: Path, including: tuple[Path, ...]) -> None:
        # All files share one bound: a file that includes the next one twice, and so on, would double the text with
        # every level.
        self._left_bytes -= path.stat().st_size
        if self._left_bytes < 0 or len(including) > _DEEPEST:
            raise UsageError(f"{path}: more gin than a model has", hint="does a file include itself?")
        block = ""
        for indented, tokens in _statements(path):
            words = [token.string for token in tokens]
            block = block if indented else ""
            if words[0] in {"import", "from"} and "=" not in words:
                self.imports[words[-1] if "from" in words or "as" in words else words[1]] = _text(tokens)
            elif words[0] == "include":
                self.read(_included(str(literal(_text(tokens[1:]))), path), (*including, path))
            elif words[-1] == ":" and "=" not in words:
                block = _key(tokens[:-1], path)
            else:
                self.bindings.append(_binding(block, tokens, path))


def _statements(path: Path) -> Iterator[tuple[bool, list[tokenize.TokenInfo]]]:
    """The tokens of every statement, and whether it is indented."""
    depth, tokens = 0, list[tokenize.TokenInfo]()
    try:
        # gin-config reads its files with Python's tokenizer, too, so that both agree on strings, brackets and continued
        # lines.
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.ERRORTOKEN and not token.string.isspace():
                raise SyntaxError(f"line {token.start[0]}: {token.string!r}")
            depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            if token.type == tokenize.NEWLINE:
                yield depth > 0, tokens
                tokens = []
            elif token.type not in _NO_TEXT:
                tokens.append(token)
    except OSError as error:
        raise NotFound(f"{path}: cannot be read", details=(str(error),)) from error
    except _MALFORMED as error:
        raise UsageError(f"{path}: not gin", details=(str(error),)) from error


def _binding(block: str, tokens: Sequence[tokenize.TokenInfo], path: Path) -> Binding:
    equals = next((i for i, token in enumerate(tokens) if token.string == "="), 0)
    if not 0 < equals < len(tokens) - 1:
        raise UsageError(f"{path}: not gin", details=(f"line {tokens[0].start[0]}: neither `=` nor `:`",))
    key = _key(tokens[:equals], path)
    *scope, selected = (f"{block}.{key}" if block else key).split("/")
    selector, _, parameter = selected.rpartition(".")
    text = _text(tokens[equals + 1 :])
    value = literal(text)
    # Literals are written anew in one line; macros and references keep their text, since only gin knows what they stand
    # for.
    return Binding(tuple(scope), selector, parameter, text if value == text else repr(value))


def _key(tokens: Sequence[tokenize.TokenInfo], path: Path) -> str:
    key = "".join(token.string for token in tokens)
    if not _KEY.fullmatch(key):
        raise UsageError(f"{path}: not gin", details=(f"line {tokens[0].start[0]}: no name stands there",))
    return key


def _text(tokens: Sequence[tokenize.TokenInfo]) -> str:
    """The text of a statement in one line, without comments."""
    text = ""
    for i, token in enumerate(tokens):
        apart = i > 0 and tokens[i - 1].end != token.start
        text += " " * apart + token.string
    return text


def _included(name: str, by: Path) -> Path:
    roots = [Path(), *by.resolve().parents]
    with suppress(ImportError, ValueError):
        package = importlib.util.find_spec("t5x")
        roots += [Path(at).parent for at in (package and package.submodule_search_locations) or ()]
    found = next((root / name for root in roots if (root / name).is_file()), None)
    if found is None:
        raise NotFound(
            f"{by}: it includes {name}, which is not there",
            hint="run fusectl in the directory that T5X is run in: includes are relative to it",
        )
    return found
