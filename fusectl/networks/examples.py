"""Batches of examples that a growth operator is learned from: those of a file, of text, or of a function.

    a .jsonl or .npz     examples, packed or not, as tokens.py reads them
    a .jsonl or .npz     {"tokens": [...]} or {"text": "..."} in each line, an array `tokens`: one stream of tokens
    any other file       text: one stream of bytes, with ByT5's ids
    module:function      a function that returns batches or examples, each a mapping with the names of tokens.py

A stream is cut into windows of one length, which do not overlap; texts and rows of tokens follow on each other in it as
they stand. A window becomes an example by span corruption, as T5 was trained, or by predicting each next token. Of a
file's rows or windows the last tenth is held out, in whole batches and no more than a few; of a function's batches the
first ones are.
"""

from __future__ import annotations

import importlib
import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible, UsageError
from fusectl.networks.tokens import (
    KNOWN,
    NAMES,
    UNREADABLE,
    Ints,
    Tokens,
    digest_of,
    from_lines,
    from_npz,
    integers,
    json_lines,
    padded,
    read_bytes,
    require_vocabulary,
    rows_of,
    shifted,
    tokens_of,
)
from fusectl.system.memory import available_bytes


Objective = Literal["span_corruption", "next_token"]

EOS = 1
# ByT5's ids: 0 to 2 are padding, the end and the unknown, then come the bytes, then sentinels.
FIRST_BYTE = 3
BYTES_VOCAB = FIRST_BYTE + 256
BYTES_SENTINEL = BYTES_VOCAB + 100 - 1
# Embeddings have more rows than T5's and mT5's vocabularies, whose last token is the first sentinel.
_SENTINELS = {32_128: 32_099, 250_112: 250_099}

NOISE = 0.15
MEAN_SPAN = 3.0

MOST_HELD_OUT = 8
# How many batches of a function are looked at before some of them are held out.
_AHEAD = 16
# Of the free memory, the part that a file may have: what its lines, or its arrays, are read into is larger than it.
_SHARES = {".jsonl": 16, ".npz": 4}
# How much of a stream is searched at once.
_PIECE = 1 << 22

_LINES = 'lines such as {"inputs": [3, 1], "targets": [5, 1]}, {"tokens": [3, 4]} or {"text": "..."}'
_HINTS = {".jsonl": _LINES, ".npz": f"a .npz of {KNOWN}, or of tokens"}


@dataclass(frozen=True)
class Examples:
    """Batches to learn from without end, and a few to measure with, `held_out`, which are never among those.

    `says` is a line for reports: what they are, how many, and of a file the first 16 digits of its sha256.
    """

    says: str
    held_out: list[Tokens] = field(repr=False)
    _begin: Callable[[], Iterator[Tokens]] = field(repr=False)

    def batches(self) -> Iterator[Tokens]:
        """Batches (batch, length) without end, the same ones in each call: of files, a function of the seed alone.

        Raises Corrupt and Incompatible for what a function returns later on.
        """
        return self._begin()


@dataclass(frozen=True)
class _Wanted:
    """What `read_examples` was asked for."""

    data: str
    vocab: int
    objective: Objective
    batch: int
    lengths: tuple[int, int]
    seed: int
    sentinel: int | None
    most_held_out: int

    @property
    def decoder_only(self) -> bool:
        return self.objective == "next_token"

    @property
    def window(self) -> int:
        """How many tokens of a stream make an example."""
        return self.lengths[1] if self.decoder_only else window_of(*self.lengths)

    def first_sentinel(self, *, of_bytes: bool) -> int:
        if self.sentinel is not None:
            return self.sentinel
        if of_bytes and self.vocab > BYTES_SENTINEL:
            return BYTES_SENTINEL
        return _SENTINELS.get(self.vocab, self.vocab - 1)


class _Rows(Protocol):
    """Rows that batches are made of, numbered from 0 on."""

    @property
    def count(self) -> int: ...

    def take(self, rows: npt.NDArray[np.intp], rng: np.random.Generator) -> Tokens:
        """The batch of these rows."""
        ...


def read_examples(
    data: str,
    *,
    vocab: int,
    objective: Objective,
    batch: int,
    lengths: tuple[int, int],
    seed: int,
    sentinel: int | None = None,
    most_held_out: int = MOST_HELD_OUT,
) -> Examples:
    """Batches of `batch` rows, of encoder tokens and of targets of at most these `lengths`: longer examples are cut.

    No more than `most_held_out` batches are held out.

    `sentinel` is what the first span of a window is replaced with, the next ones with the tokens below it. Left out, it
    is T5's or mT5's of a vocabulary of that size, that of ByT5's ids with 100 more for bytes, and otherwise the last
    token. A function's batches keep their number of rows, not `batch`, which is for examples that come one by one, and
    are padded to the lengths. It is called anew whenever there are no more.

    Raises NotFound, StorageError, Corrupt for what holds no tokens, Incompatible for tokens that are not in the
    vocabulary or are sentinels, and for fewer than two batches; UsageError for sizes that make no example, for what is
    no file or larger than memory allows, and for a module or function that is not there.
    """
    wanted = _Wanted(data, vocab, objective, batch, lengths, seed, sentinel, most_held_out)
    _require_sizes(wanted)
    if _is_function(data):
        return _of_function(wanted)
    suffix = Path(data).suffix.lower()
    raw = read_bytes(data, available_bytes() // _SHARES.get(suffix, 2))
    try:
        rows, says = _read(wanted, raw, suffix)
    except UNREADABLE as error:
        raise Corrupt(f"{data}: no tokens in it", details=(f"{error}",), hint=_HINTS.get(suffix)) from error
    if rows.count < 2 * batch:
        raise Incompatible(
            f"{data}: too little for a batch of {batch} to learn from and one to hold out",
            details=(f"{says}; {2 * batch:,} rows or windows are needed",),
            hint="a smaller batch, shorter lengths, or more data",
        )
    held = min(wanted.most_held_out, max(1, rows.count // (10 * batch)))
    training = rows.count - held * batch
    says = f"{Path(data).name}: {says}, the last {held * batch} held out, sha256 {digest_of(raw)}"
    # The same for any seed, so that runs can be compared.
    rng = np.random.default_rng(0)
    held_out = [
        replace(rows.take(np.arange(start, start + batch), rng), says=says)
        for start in range(training, rows.count, batch)
    ]

    def begin() -> Iterator[Tokens]:
        for epoch in itertools.count():
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(training)
            # What is left makes no batch; another epoch leaves out others.
            for start in range(0, training - batch + 1, batch):
                yield replace(rows.take(order[start : start + batch], rng), says=says)

    return Examples(says, held_out, begin)


def _require_sizes(wanted: _Wanted) -> None:
    least, lengths = (1, wanted.lengths[1:]) if wanted.decoder_only else (3, wanted.lengths)
    for says, wrong in (
        (f"a batch of {wanted.batch}: at least 1", wanted.batch < 1),
        (f"a seed of {wanted.seed}: at least 0", wanted.seed < 0),
        (f"a length of {min(lengths)}: at least {least}", min(lengths) < least),
        (
            f"a sentinel of {wanted.sentinel}: above {EOS} and in the vocabulary of {wanted.vocab:,}",
            wanted.sentinel is not None and not EOS < wanted.sentinel < wanted.vocab,
        ),
    ):
        if wrong:
            raise UsageError(says)


# Files.


def _read(wanted: _Wanted, raw: bytes, suffix: str) -> tuple[_Rows, str]:
    """The rows of a file, and what they are. Raises one of UNREADABLE for what holds none."""
    if suffix == ".npz":
        arrays = from_npz(raw, available_bytes() // 4)
        if "tokens" in arrays and not _are_examples(arrays):
            return _stream_of_array(wanted, arrays["tokens"])
        return _ready(wanted, arrays)
    if suffix == ".jsonl":
        first = next((line for _, line in json_lines(raw)), {})
        name = next((name for name in ("tokens", "text") if name in first), None)
        if name is not None and not _are_examples(first):
            return _stream_of_lines(wanted, raw, name)
        return _ready(wanted, from_lines(raw, max(wanted.lengths)))
    if not raw:
        raise ValueError("the file is empty")
    return _windows(wanted, _Stream(np.frombuffer(raw, np.uint8), lambda at: f"at byte {at:,}", of_bytes=True))


def _are_examples(named: Mapping[str, Any]) -> bool:
    return any(name in named for key in ("encoder", "targets") for name in NAMES[key])


def _ready(wanted: _Wanted, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[_Rows, str]:
    tokens = tokens_of(arrays, None, wanted.lengths, decoder_only=wanted.decoder_only)
    require_vocabulary(wanted.data, tokens, wanted.vocab)
    # A batch of rows that ask for nothing would have no loss.
    asking = np.flatnonzero(tokens.compared.any(axis=1))
    idle = len(tokens.targets) - len(asking)
    return _Ready(tokens, asking), rows_of(tokens) + (f", {idle} without targets left out" if idle else "")


def _stream_of_array(wanted: _Wanted, values: npt.NDArray[Any]) -> tuple[_Rows, str]:
    if values.ndim not in {1, 2} or values.dtype.kind not in "iu":
        raise ValueError(
            f"tokens: {values.dtype} of shape {list(values.shape)}, not integers (length) or (batch, length)"
        )

    def place(at: int) -> str:
        return f"at position {at:,}" if values.ndim == 1 else "in row {}, at position {}".format(*divmod(at, width))

    width = values.shape[-1]
    return _windows(wanted, _Stream(values.reshape(-1), place))


def _stream_of_lines(wanted: _Wanted, raw: bytes, name: str) -> tuple[_Rows, str]:
    """The windows of the tokens or of the texts of lines of JSON."""
    numbers, pieces = [], []
    for number, line in json_lines(raw):
        if name not in line:
            raise ValueError(f"line {number} has no {name!r}")
        numbers.append(number)
        pieces.append(integers(name, line[name]) if name == "tokens" else _bytes_of(number, line[name]))
    ends = np.cumsum([len(piece) for piece in pieces])
    stream = np.concatenate(pieces)
    # As large again.
    del pieces

    def place(at: int) -> str:
        i = int(np.searchsorted(ends, at, side="right"))
        return f"in line {numbers[i]}, at {'byte' if name == 'text' else 'position'} {at - (ends[i - 1] if i else 0)}"

    return _windows(wanted, _Stream(stream, place, of_bytes=name == "text"))


def _bytes_of(number: int, text: object) -> npt.NDArray[np.uint8]:
    if not isinstance(text, str):
        raise ValueError(f"'text' of line {number} is no text")  # noqa: TRY004
    return np.frombuffer(text.encode(), np.uint8)


@dataclass(frozen=True)
class _Ready:
    """Examples that a file has, those of its rows that ask for something."""

    tokens: Tokens
    rows: npt.NDArray[np.intp]

    @property
    def count(self) -> int:
        return len(self.rows)

    def take(self, rows: npt.NDArray[np.intp], rng: np.random.Generator) -> Tokens:  # noqa: ARG002
        at, own = self.rows[rows], self.tokens
        return Tokens(
            own.encoder[at],
            own.decoder[at],
            own.targets[at],
            None if own.encoder_segments is None else own.encoder_segments[at],
            None if own.target_segments is None else own.target_segments[at],
        )


@dataclass(frozen=True)
class _Stream:
    """What a file holds, (length,) in its order: tokens, or bytes; `place` says where in the file a position is."""

    values: npt.NDArray[Any]
    place: Callable[[int], str]
    of_bytes: bool = False

    @property
    def offset(self) -> int:
        """What makes values tokens."""
        return FIRST_BYTE if self.of_bytes else 0

    def refuse(
        self, path: str, wrong: Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]], says: str, *details: str
    ) -> None:
        """Raises Incompatible where values are wrong; `says` is what the first one's token is."""
        count, first = 0, -1
        # In pieces: a mask of all would be as large as the file.
        for start in range(0, len(self.values), _PIECE):
            at = np.flatnonzero(wrong(self.values[start : start + _PIECE]))
            first = start + int(at[0]) if len(at) and not count else first
            count += len(at)
        if count:
            raise Incompatible(
                f"{path}: token {int(self.values[first]) + self.offset} is {says}",
                details=(f"{count:,} such tokens, first {self.place(first)}", *details),
            )


@dataclass(frozen=True)
class _Windows:
    """A stream in windows of `length` values that are tokens less `offset`, stored as narrow as they are."""

    values: npt.NDArray[Any]
    offset: int
    length: int
    # None where each next token is to be predicted.
    sentinel: int | None

    @property
    def count(self) -> int:
        return len(self.values) // self.length

    def take(self, rows: npt.NDArray[np.intp], rng: np.random.Generator) -> Tokens:
        windows = [
            self.values[start : start + self.length].astype(np.int32) + np.int32(self.offset)
            for start in (int(row) * self.length for row in rows)
        ]
        if self.sentinel is None:
            targets = np.stack(windows)
            # No decoder looks at the encoder's tokens; rows are counted by them.
            return Tokens(np.zeros((len(rows), 1), np.int32), shifted(targets), targets)
        inputs, outputs = zip(*(corrupt_spans(window, self.sentinel, rng) for window in windows), strict=True)
        targets = padded(outputs)
        return Tokens(padded(inputs), shifted(targets), targets)


def _windows(wanted: _Wanted, stream: _Stream) -> tuple[_Rows, str]:
    """The windows of a stream without its padding, and what they are.

    Raises ValueError for nothing but padding; Incompatible for tokens that are not in the vocabulary, and for those
    that are sentinels.
    """
    _require_in_vocabulary(wanted, stream)
    length, sentinel, says = wanted.window, None, "next tokens"
    if not wanted.decoder_only:
        sentinel = wanted.first_sentinel(of_bytes=stream.of_bytes)
        last = sentinel - span_counts(length)[1] + 1
        _require_free(wanted, stream, sentinel, last)
        says = f"span corruption with sentinels {sentinel} to {last}"
    values, what = stream.values, "bytes"
    if not stream.of_bytes:
        values, what = values[values > 0].astype(np.min_scalar_type(max(wanted.vocab - 1, 1))), "tokens"
    if not len(values):
        raise ValueError("no token that is not padding")
    windows = _Windows(values, stream.offset, length, sentinel)
    return windows, f"{len(values):,} {what}, {windows.count:,} windows of {length}, {says}"


def _require_in_vocabulary(wanted: _Wanted, stream: _Stream) -> None:
    if not stream.of_bytes:
        stream.refuse(
            wanted.data,
            lambda values: (values < 0) | (values >= wanted.vocab),
            f"not in the vocabulary of {wanted.vocab:,}",
        )
    elif wanted.vocab < BYTES_VOCAB:
        raise Incompatible(
            f"{wanted.data}: bytes as tokens need a vocabulary of {BYTES_VOCAB}, not of {wanted.vocab:,}",
            hint="of another vocabulary, a .npz or .jsonl of tokens",
        )


def _require_free(wanted: _Wanted, stream: _Stream, sentinel: int, last: int) -> None:
    """Raises Incompatible for tokens that would stand for spans, too, and where there are too few below the first."""
    spans = f"windows of {wanted.window} tokens have {sentinel - last + 1} spans"
    if last <= EOS:
        raise Incompatible(
            f"{wanted.data}: too few tokens for sentinels from {sentinel} down",
            details=(spans,),
            hint="a larger sentinel, or shorter lengths",
        )
    least, most = last - stream.offset, sentinel - stream.offset
    stream.refuse(
        wanted.data,
        lambda values: (values >= least) & (values <= most),
        f"one of the sentinels, {sentinel} down to {last}",
        spans,
        "another sentinel keeps them apart, and so may shorter lengths, with fewer spans",
    )


# Span corruption.


def span_counts(length: int, noise: float = NOISE, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """How many tokens of a window are taken out, and in how many spans; at least one, and one is left before each.

    >>> span_counts(568)
    (85, 28)
    """
    taken = min(max(round(length * noise), 1), length - 1)
    spans = min(max(round(taken / mean_span), 1), taken, length - taken)
    return taken, spans


def window_of(encoder_length: int, target_length: int | None = None) -> int:
    """The longest window whose inputs and targets are no longer than these, with their sentinels and ends.

    Without `target_length` it fills the inputs to the last token.

    >>> window_of(512), window_of(512, 114), window_of(512, 100)
    (568, 568, 496)
    """

    def fits(window: int) -> bool:
        taken, spans = span_counts(window)
        return window - taken + spans < encoder_length and (target_length is None or taken + spans < target_length)

    # Neither length falls while the window grows, so that no longer one fits either.
    return next(window for window in itertools.count(2) if not fits(window + 1))


def full_target_length(encoder_length: int) -> int:
    """How long the targets of a window are that fills the inputs.

    >>> full_target_length(512)
    114
    """
    return sum(span_counts(window_of(encoder_length))) + 1


def corrupt_spans(
    window: Ints, sentinel: int, rng: np.random.Generator, *, noise: float = NOISE, mean_span: float = MEAN_SPAN
) -> tuple[Ints, Ints]:
    """The inputs and targets of a window (length,) of at least two tokens: of all ways to choose that many spans any.

    A window begins with what is kept and ends with a span, so that there are as many of either. In the inputs
    `sentinel` and the tokens below it stand for the spans; in the targets, for what is kept before each. So the targets
    end with the last span, not with one more sentinel. Both have an end of their own.
    """
    taken, spans = span_counts(len(window), noise, mean_span)
    # As in T5's random_spans_noise_mask, lengths of kept and of taken stretches are drawn apart, and alternate.
    kept_sizes, taken_sizes = (_parts(total, spans, rng) for total in (len(window) - taken, taken))
    sizes = np.stack([kept_sizes, taken_sizes], axis=1).reshape(-1)
    is_taken = np.repeat(np.tile([False, True], spans), sizes)
    sentinels = np.arange(sentinel, sentinel - spans, -1)
    inputs = np.insert(window[~is_taken], np.cumsum(kept_sizes), sentinels)
    targets = np.insert(window[is_taken], np.cumsum(taken_sizes) - taken_sizes, sentinels)
    return np.append(inputs, np.int32(EOS)), np.append(targets, np.int32(EOS))


def _parts(total: int, parts: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """So many sizes of at least 1 that add up to `total`, each such list as likely as any other."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


# Functions.


def _is_function(data: str) -> bool:
    module, colon, function = data.partition(":")
    named = all(part.isidentifier() for part in (*module.split("."), *function.split(".")))
    return bool(colon) and named and not Path(data).exists()


def _of_function(wanted: _Wanted) -> Examples:
    function = _imported(wanted.data)
    rows: list[Ints] = []
    size, widths = wanted.batch, None
    for item in _items(wanted, function):
        if widths is None:
            size, widths = item.batch or size, item.widths
        rows += item.rows
        if len(rows) >= _AHEAD * size:
            break
    if widths is None:
        raise Corrupt(f"{wanted.data}: no examples came back")
    if len(rows) < 2 * size:
        raise Incompatible(
            f"{wanted.data}: too little for a batch of {size} to learn from and one to hold out",
            details=(f"{len(rows)} examples came back; {2 * size} are needed",),
        )
    held = min(wanted.most_held_out, max(1, len(rows) // (4 * size)))
    longest = " and ".join(map(str, wanted.lengths[wanted.decoder_only :]))
    says = f"{wanted.data}: {size} rows of {longest} in a batch, the first {held} batches held out"
    held_out = [_joined(rows[start : start + size], widths, says) for start in range(0, held * size, size)]
    known = {row.tobytes() for row in rows[: held * size]}

    def begin() -> Iterator[Tokens]:
        waiting: list[Ints] = []
        while True:
            seen = fresh = 0
            for item in _items(wanted, function, widths):
                # By what they hold: they may come in another order each time.
                new = [row for row in item.rows if row.tobytes() not in known]
                seen, fresh = seen + len(item.rows), fresh + len(new)
                waiting += new
                while len(waiting) >= size:
                    yield _joined(waiting[:size], widths, says)
                    del waiting[:size]
            if not fresh:
                raise Corrupt(
                    f"{wanted.data}: called again, it returned nothing to learn from",
                    details=("only examples that are held out" if seen else "no examples",),
                    hint="it is called once for every epoch, and returns something new to iterate over each time",
                )

    return Examples(says, held_out, begin)


def _imported(data: str) -> Callable[[], Any]:
    """The function that `module:function` names. Raises UsageError where there is none, Corrupt where imports fail."""
    module, _, name = data.partition(":")
    here = os.getcwd()  # noqa: PTH109
    # Last, so that nothing there stands in for what others import.
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        # What is missing may also be something that the module imports.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{data}: no such file, and no module {error.name}",
                hint="modules are looked for where Python does, and in the current directory",
            ) from error
        raise Corrupt(f"{data}: the module cannot be imported", details=(_reason(error),)) from error
    try:
        function: Callable[[], Any] = operator.attrgetter(name)(found)
    except AttributeError as error:
        raise UsageError(f"{data}: no {name} in the module", details=(str(error),)) from error
    if not callable(function):
        raise UsageError(f"{data}: no function, but {type(function).__name__}")
    return function


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Item:
    """What a function returned at once: each row with all of its arrays side by side, and how wide each array is;
    how many rows it calls a batch, 0 for one example.
    """

    rows: list[Ints]
    widths: tuple[int, ...]
    batch: int


def _items(wanted: _Wanted, function: Callable[[], Any], widths: tuple[int, ...] | None = None) -> Iterator[_Item]:
    """What comes back from one call of a function, all of it with arrays of these widths, or of the first item's.

    Raises Corrupt where the function raises and for what holds no examples, Incompatible for tokens that are not in the
    vocabulary.
    """

    def attempt(says: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise Corrupt(f"{wanted.data}: {says}", details=(_reason(error),)) from error

    returned = attempt("the function failed", function)
    iterator = attempt("nothing to iterate over came back", lambda: iter(returned))
    end = object()
    for number in itertools.count():
        found = attempt(f"failed at item {number}", lambda: next(iterator, end))
        if found is end:
            return
        item = _item(wanted, found, f"{wanted.data}: item {number}")
        widths = widths or item.widths
        if item.widths != widths:
            raise Corrupt(f"{wanted.data}: item {number} is packed and others are not, or the other way round")
        yield item


def _item(wanted: _Wanted, found: object, label: str) -> _Item:
    try:
        if not isinstance(found, Mapping):
            raise ValueError(f"{type(found).__name__}, not a mapping")  # noqa: TRY004
        names = [name for names in NAMES.values() for name in names] + ["tokens"] * wanted.decoder_only
        arrays = {name: np.asarray(found[name]) for name in names if name in found}
        is_batch = any(values.ndim != 1 for values in arrays.values())
        if not is_batch:
            arrays = {name: values[None] for name, values in arrays.items()}
        if "tokens" in arrays:
            # Beside targets they are what the decoder reads.
            beside = any(name in arrays for name in NAMES["targets"])
            arrays.setdefault(NAMES["decoder" if beside else "targets"][0], arrays["tokens"])
        tokens = tokens_of(arrays, None, wanted.lengths, decoder_only=wanted.decoder_only)
    except UNREADABLE as error:
        hint = f"a mapping with {KNOWN}" + (", or tokens" if wanted.decoder_only else "")
        raise Corrupt(f"{label} holds no examples", details=(f"{error}",), hint=hint) from error
    require_vocabulary(label, tokens, wanted.vocab)
    encoder_length, target_length = (1 if wanted.decoder_only else wanted.lengths[0]), wanted.lengths[1]
    columns = [
        np.zeros((len(tokens.targets), 0), np.int32)
        if values is None
        else np.pad(values, ((0, 0), (0, length - values.shape[1])))
        for values, length in (
            (tokens.encoder, encoder_length),
            (tokens.decoder, target_length),
            (tokens.targets, target_length),
            (tokens.encoder_segments, encoder_length),
            (tokens.target_segments, target_length),
        )
    ]
    flat = np.concatenate(columns, axis=1)[tokens.compared.any(axis=1)]
    return _Item(list(flat), tuple(values.shape[1] for values in columns), len(tokens.targets) if is_batch else 0)


def _joined(rows: Sequence[Ints], widths: tuple[int, ...], says: str) -> Tokens:
    encoder, decoder, targets, *segments = (
        np.ascontiguousarray(values) for values in np.split(np.stack(rows), np.cumsum(widths)[:-1], axis=1)
    )
    encoder_segments, target_segments = (values if values.shape[1] else None for values in segments)
    return Tokens(encoder, decoder, targets, encoder_segments, target_segments, says)
