"""Batches of tokens: random ones, or those of a file, with padding and packed examples.

    {"inputs": [8774, 1], "targets": [1622, 1]}                 a line of JSON for each example, or
    encoder_input_tokens (batch, length), decoder_target_tokens …   arrays of a .npz, named as T5X's features

Decoder inputs are the targets shifted right by one, each segment by itself, unless the file has them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible
from fusectl.system.given import read_given
from fusectl.system.jsontree import parsed


Ints = npt.NDArray[np.int32]

# Names of the same arrays: T5X's features, seqio's, and short ones.
NAMES = {
    "encoder": ("encoder_input_tokens", "inputs", "enc"),
    "targets": ("decoder_target_tokens", "targets", "tgt"),
    "decoder": ("decoder_input_tokens", "dec"),
    "encoder_segments": ("encoder_segment_ids", "inputs_segment_ids"),
    "target_segments": ("decoder_segment_ids", "targets_segment_ids"),
}
DEFAULT_BATCH = 4
DEFAULT_LENGTH = 16
# Of a file, and of what its arrays take in memory; much more than any model is measured with.
# Without bounds a .npz of 18 MB that held zeros took 5.1 GB, and a line of JSON of 120 MB took 1.5 GB.
LARGEST_BYTES = 64 << 20
LARGEST_ARRAYS_BYTES = 256 << 20
MOST_ARRAYS = 1000
MOST_LINES = 2_000_000
KNOWN = ", ".join(names[0] for names in NAMES.values())


# Whatever a file may hold in place of tokens.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Tokens:
    """A batch (batch, length): encoder tokens, decoder inputs and targets, 0 being padding; and, where examples are
    packed, which segment each token belongs to, from 1 on.
    """

    encoder: Ints
    decoder: Ints
    targets: Ints
    encoder_segments: Ints | None = None
    target_segments: Ints | None = None
    # Where they came from, for the report; and which of its rows is the first one here.
    says: str = ""
    first_row: int = 0

    @property
    def compared(self) -> npt.NDArray[np.bool_]:
        """(batch, length): the positions whose target is no padding."""
        return self.targets > 0

    def pieces(self, rows: int) -> Iterator[Tokens]:
        """The batch in pieces of at most so many rows."""
        for start in range(0, len(self.encoder), rows):
            cut = slice(start, start + rows)
            yield replace(
                self,
                encoder=self.encoder[cut],
                decoder=self.decoder[cut],
                targets=self.targets[cut],
                encoder_segments=None if self.encoder_segments is None else self.encoder_segments[cut],
                target_segments=None if self.target_segments is None else self.target_segments[cut],
                first_row=self.first_row + start,
            )


def random_tokens(vocab: int, batch: int, length: int, seed: int) -> Tokens:
    """Uniform tokens of a vocabulary: of every four rows one is full, one has a padded input, one padded targets, and
    one holds two packed examples.
    """
    rng = np.random.default_rng(seed)
    encoder, targets = (rng.integers(1, vocab, (batch, length), dtype=np.int32) for _ in range(2))
    # Full rows alone would leave the masks of padding and of segments untried.
    encoder[::4, length - length // 4 :] = 0
    targets[1::4, length - length // 4 :] = 0
    segments = np.ones((batch, length), np.int32)
    segments[2::4, length // 2 :] = 2
    encoder_segments, target_segments = segments * (encoder > 0), segments * (targets > 0)
    says = (
        f"{batch} rows of {length} random ones, seed {seed}; of every four one each padded in inputs or targets, packed"
    )
    return Tokens(encoder, shifted(targets, target_segments), targets, encoder_segments, target_segments, says)


def read_tokens(path: str, vocab: int, batch: int | None, length: int | None) -> Tokens:
    """The tokens of a .npz or .jsonl file, at most `batch` rows of `length`.

    Raises NotFound, UsageError for what is no file or too large, Corrupt for what holds no tokens, Incompatible for
    tokens out of the vocabulary.
    """
    raw = read_bytes(path)
    try:
        arrays = from_npz(raw) if raw[:2] == b"PK" else from_lines(raw, length)
        tokens = tokens_of(arrays, batch, (length, length))
    except UNREADABLE as error:
        hint = f'lines such as {{"inputs": [3, 1], "targets": [5, 1]}}, or a .npz of {KNOWN}'
        raise Corrupt(f"{path}: no tokens in it", details=(f"{error}",), hint=hint) from error
    require_vocabulary(path, tokens, vocab)
    says = f"{Path(path).name}: {rows_of(tokens)}, sha256 {digest_of(raw)}"
    return replace(tokens, says=says)


def read_bytes(path: str, most_bytes: int = LARGEST_BYTES) -> bytes:
    """What is in a file of tokens; `~` is the home directory. Raises NotFound, UsageError, StorageError."""
    return read_given(path, most_bytes, "tokens")


def digest_of(raw: bytes) -> str:
    """What a report names a file's bytes by: the first 16 digits of their sha256."""
    return hashlib.sha256(raw).hexdigest()[:16]


def rows_of(tokens: Tokens) -> str:
    """How many rows there are, how long, and whether they are packed, in words."""
    rows, columns = tokens.targets.shape
    packed = "" if tokens.target_segments is None else ", packed"
    return f"{rows} rows of {tokens.encoder.shape[1]} and {columns}{packed}"


def require_vocabulary(path: str, tokens: Tokens, vocab: int) -> None:
    """Raises Incompatible for tokens that are not in a vocabulary of so many."""
    for name, values in (("inputs", tokens.encoder), ("targets", tokens.targets), ("decoder inputs", tokens.decoder)):
        outside = np.argwhere((values < 0) | (values >= vocab))
        if len(outside):
            row, at = (int(i) for i in outside[0])
            raise Incompatible(
                f"{path}: token {values[row, at]} is not in the vocabulary of {vocab:,}",
                details=(f"{len(outside):,} such tokens, first in the {name} of row {row}, at position {at}",),
            )


def from_npz(raw: bytes, most_bytes: int = LARGEST_ARRAYS_BYTES) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a .npz. Raises one of UNREADABLE for what is none, and for arrays of more than `most_bytes`."""
    if raw.count(b"PK\x01\x02") > MOST_ARRAYS:
        raise ValueError(f"more than {MOST_ARRAYS:,} arrays")
    with zipfile.ZipFile(io.BytesIO(raw)) as packed:
        nbytes = sum(_size_of(packed, each) for each in packed.infolist())
    if nbytes > most_bytes:
        raise ValueError(f"arrays of {nbytes:,} bytes, more than the {most_bytes:,} that they may have")
    with np.load(io.BytesIO(raw)) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _size_of(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """How many bytes a member takes in memory: of an array its header tells, since few bytes may stand for many."""
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError(f"{member.filename}: compressed as numpy does not")
    if not member.filename.endswith(".npy"):
        return member.file_size
    with packed.open(member) as file:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize


def json_lines(raw: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects that stand in lines of JSON, each with the number of its line, from 1 on; blank lines are skipped.

    Raises ValueError, or another one of UNREADABLE.
    """
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig"), 1):
        if not line.strip():
            continue
        if number > MOST_LINES:
            raise ValueError(f"more than {MOST_LINES:,} lines")
        try:
            example = parsed(line.encode())
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(example, Mapping):
            raise ValueError(f"line {number} is no object")  # noqa: TRY004
        yield number, example


def integers(name: str, tokens: object) -> Ints:
    """A list of a line of JSON, which is called `name`, as an array (length,). Raises ValueError, OverflowError."""
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError(f"{name!r} of a line is no list of integers")
    return _narrow(name, np.array(tokens, np.int64))


def from_lines(raw: bytes, length: int | None) -> dict[str, npt.NDArray[Any]]:
    """Examples of different lengths as arrays (batch, length): cut to `length`, then padded to the longest.

    Raises ValueError, or another one of UNREADABLE, for what is no such file.
    """
    known = {name for names in NAMES.values() for name in names}
    examples = [
        {name: integers(name, row)[:length] for name, row in example.items() if name in known}
        for _, example in json_lines(raw)
    ]
    if not examples:
        raise ValueError("the file is empty")
    arrays = {}
    for name in dict.fromkeys(name for example in examples for name in example):
        lacking = next((i for i, example in enumerate(examples) if name not in example), None)
        if lacking is not None:
            raise ValueError(f"example {lacking} has no {name!r}")
        arrays[name] = padded([example[name] for example in examples])
    return arrays


def padded(rows: Sequence[Ints]) -> Ints:
    """Rows of different lengths as one array (batch, length of the longest), with 0 behind the shorter ones.

    Raises ValueError where one long row would make it larger than arrays may be.
    """
    nbytes = 4 * len(rows) * max(map(len, rows))
    if nbytes > LARGEST_ARRAYS_BYTES:
        raise ValueError(f"{len(rows):,} rows, padded to the longest: {nbytes:,} bytes; cut it, or split the file")
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _narrow(name: str, values: npt.NDArray[Any]) -> Ints:
    if values.size and (int(values.max()) > np.iinfo(np.int32).max or int(values.min()) < np.iinfo(np.int32).min):
        raise ValueError(f"{name}: a token of more than 31 bits")
    return values.astype(np.int32)


def tokens_of(
    arrays: Mapping[str, npt.NDArray[Any]],
    batch: int | None,
    lengths: tuple[int | None, int | None],
    *,
    decoder_only: bool = False,
) -> Tokens:
    """The batch that arrays (batch, length) by any of NAMES are, at most `batch` rows, inputs and targets cut to their
    `lengths`. `decoder_only` leaves inputs out: the encoder's tokens are (batch, 1) of padding then.

    Raises ValueError for arrays that are none.
    """

    def named(key: str, length: int | None) -> Ints | None:
        values = next((arrays[name] for name in NAMES[key] if name in arrays), None)
        if values is None or (decoder_only and key.startswith("encoder")):
            return None
        if values.ndim != 2 or values.dtype.kind not in "iu":
            raise ValueError(f"{key}: {values.dtype} of shape {list(values.shape)}, not integers (batch, length)")
        return _narrow(key, values[:batch, :length])

    encoder, targets = named("encoder", lengths[0]), named("targets", lengths[1])
    if decoder_only and targets is not None:
        encoder = np.zeros((len(targets), 1), np.int32)
    if encoder is None or targets is None:
        needed = "targets" if decoder_only else "inputs and targets"
        raise ValueError(f"{needed} are needed; it has {', '.join(arrays) or 'nothing'}")
    encoder_segments, target_segments = named("encoder_segments", lengths[0]), named("target_segments", lengths[1])
    if not decoder_only and (encoder_segments is None) != (target_segments is None):
        raise ValueError("segments of inputs and targets belong together")
    decoder = named("decoder", lengths[1])
    for name, values, like in (
        ("decoder inputs", decoder, targets),
        ("segments of the inputs", encoder_segments, encoder),
        ("segments of the targets", target_segments, targets),
    ):
        if values is not None and values.shape != like.shape:
            raise ValueError(f"{name} of shape {list(values.shape)} beside {list(like.shape)}")
    if len(encoder) != len(targets):
        raise ValueError(f"{len(encoder)} rows of inputs, {len(targets)} of targets")
    for name, values in (("input", encoder), ("target", targets)):
        if not (values > 0).any() and (name == "target" or not decoder_only):
            raise ValueError(f"no {name} that is not padding")
    if decoder is None:
        decoder = shifted(targets, target_segments)
    return Tokens(encoder, decoder, targets, encoder_segments, target_segments)


def shifted(targets: Ints, segments: Ints | None = None) -> Ints:
    """Targets shifted right by one; a segment begins with 0, as if it stood alone."""
    moved = np.concatenate([np.zeros((len(targets), 1), np.int32), targets[:, :-1]], axis=1)
    if segments is not None:
        moved[:, 1:][segments[:, 1:] != segments[:, :-1]] = 0
    return moved
