"""Batches of tokens: random ones, or those of a file, with padding and packed examples.

    {"inputs": [8774, 1], "targets": [1622, 1]}                 a line of JSON for each example, or
    encoder_input_tokens (batch, length), decoder_target_tokens …   arrays of a .npz, named as T5X's features

Decoder inputs are the targets shifted right by one, each segment by itself, unless the file has them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible, NotFound, StorageError


Ints = npt.NDArray[np.int32]

# Names of the same arrays: T5X's features, seqio's, and short ones.
_NAMES = {
    "encoder": ("encoder_input_tokens", "inputs", "enc"),
    "targets": ("decoder_target_tokens", "targets", "tgt"),
    "decoder": ("decoder_input_tokens", "dec"),
    "encoder_segments": ("encoder_segment_ids", "inputs_segment_ids"),
    "target_segments": ("decoder_segment_ids", "targets_segment_ids"),
}
DEFAULT_BATCH = 4
DEFAULT_LENGTH = 16
_KNOWN = ", ".join(names[0] for names in _NAMES.values())


# Whatever a file may hold in place of tokens.
_UNREADABLE = (
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
    encoder[::4, length - length // 4 :] = 0
    targets[1::4, length - length // 4 :] = 0
    segments = np.ones((batch, length), np.int32)
    segments[2::4, length // 2 :] = 2
    encoder_segments, target_segments = segments * (encoder > 0), segments * (targets > 0)
    says = (
        f"{batch} rows of {length} random ones, seed {seed}; of every four one each padded in inputs or targets, packed"
    )
    return Tokens(encoder, _shifted(targets, target_segments), targets, encoder_segments, target_segments, says)


def read_tokens(path: str, vocab: int, batch: int | None, length: int | None) -> Tokens:
    """The tokens of a .npz or .jsonl file, at most `batch` rows of `length`.

    Raises NotFound, Corrupt for what is no such file or holds no tokens, Incompatible for tokens out of the vocabulary.
    """
    file = Path(os.path.expanduser(path))  # noqa: PTH111
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no file of tokens") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read", details=(str(error),)) from error
    try:
        arrays = _from_npz(raw) if raw[:2] == b"PK" else _from_lines(raw)
        tokens = _tokens(arrays, batch, length)
    except _UNREADABLE as error:
        hint = f'lines such as {{"inputs": [3, 1], "targets": [5, 1]}}, or a .npz of {_KNOWN}'
        raise Corrupt(f"{path}: no tokens in it", details=(f"{error}",), hint=hint) from error
    for name, values in (("inputs", tokens.encoder), ("targets", tokens.targets), ("decoder inputs", tokens.decoder)):
        outside = np.argwhere((values < 0) | (values >= vocab))
        if len(outside):
            row, at = (int(i) for i in outside[0])
            raise Incompatible(
                f"{path}: token {values[row, at]} is not in the vocabulary of {vocab:,}",
                details=(f"{len(outside):,} such tokens, first in the {name} of row {row}, at position {at}",),
            )
    digest = hashlib.sha256(raw).hexdigest()[:16]
    rows, columns = tokens.targets.shape
    packed = "" if tokens.target_segments is None else ", packed"
    says = f"{file.name}: {rows} rows of {tokens.encoder.shape[1]} and {columns}{packed}, sha256 {digest}"
    return replace(tokens, says=says)


def _from_npz(raw: bytes) -> dict[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(raw)) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _from_lines(raw: bytes) -> dict[str, npt.NDArray[Any]]:
    """Examples of different lengths, padded to the longest."""
    examples = [json.loads(line) for line in raw.decode("utf-8-sig").splitlines() if line.strip()]
    if not examples:
        raise ValueError("the file is empty")
    if not all(isinstance(example, Mapping) for example in examples):
        raise ValueError("a line is no object")
    names = dict.fromkeys(name for example in examples for name in example)
    known = {name for names in _NAMES.values() for name in names}
    arrays = {}
    for name in names:
        if name in known:
            lacking = next((i for i, example in enumerate(examples) if name not in example), None)
            if lacking is not None:
                raise ValueError(f"example {lacking} has no {name!r}")
            rows = [example[name] for example in examples]
            if not all(isinstance(row, list) and all(type(token) is int for token in row) for row in rows):
                raise ValueError(f"{name!r} of a line is no list of integers")
            width = max(map(len, rows))
            arrays[name] = np.array([row + [0] * (width - len(row)) for row in rows])
    return arrays


def _tokens(arrays: Mapping[str, npt.NDArray[Any]], batch: int | None, length: int | None) -> Tokens:
    def named(key: str) -> Ints | None:
        values = next((arrays[name] for name in _NAMES[key] if name in arrays), None)
        if values is None:
            return None
        if values.ndim != 2 or values.dtype.kind not in "iu":
            raise ValueError(f"{key}: {values.dtype} of shape {list(values.shape)}, not integers (batch, length)")
        if values.size and (int(values.max()) > np.iinfo(np.int32).max or int(values.min()) < np.iinfo(np.int32).min):
            raise ValueError(f"{key}: a token of more than 31 bits")
        return values[:batch, :length].astype(np.int32)

    encoder, targets = named("encoder"), named("targets")
    if encoder is None or targets is None:
        raise ValueError(f"inputs and targets are needed; it has {', '.join(arrays) or 'nothing'}")
    encoder_segments, target_segments = named("encoder_segments"), named("target_segments")
    if (encoder_segments is None) != (target_segments is None):
        raise ValueError("segments of inputs and targets belong together")
    decoder = named("decoder")
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
        if not (values > 0).any():
            raise ValueError(f"no {name} that is not padding")
    shifted = _shifted(targets, target_segments) if decoder is None else decoder
    return Tokens(encoder, shifted, targets, encoder_segments, target_segments)


def _shifted(targets: Ints, segments: Ints | None) -> Ints:
    """Targets shifted right by one; a segment begins with 0, as if it stood alone."""
    shifted = np.concatenate([np.zeros((len(targets), 1), np.int32), targets[:, :-1]], axis=1)
    if segments is not None:
        shifted[:, 1:][segments[:, 1:] != segments[:, :-1]] = 0
    return shifted
