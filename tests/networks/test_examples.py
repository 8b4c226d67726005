"""Batches to learn from, of examples, tokens, text and functions: what they hold, what is held out, what is refused."""

import itertools
import json
import os
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusectl.errors import Corrupt, Incompatible, NotFound, StorageError, UsageError
from fusectl.networks.examples import corrupt_spans, full_target_length, read_examples, span_counts, window_of


def lines(path, *examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def arrays(path, **named):
    np.savez(path, **named)
    return str(path)


def read(data, **changed):
    wanted = {"vocab": 384, "objective": "span_corruption", "batch": 4, "lengths": (32, 16), "seed": 0}
    return read_examples(str(data), **{**wanted, **changed})


def first(examples, n=6):
    return list(itertools.islice(examples.batches(), n))


def same(one, two):
    """Whether two lists of batches hold the same arrays."""
    names = ("encoder", "decoder", "targets", "encoder_segments", "target_segments")
    return len(one) == len(two) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for a, b in zip(one, two) for name in names
    )


def spliced(inputs, targets, sentinel, spans):
    """The window that inputs and targets were made of, spans put back where their sentinels stand."""
    assert inputs[-1] == targets[-1] == 1
    marks = list(range(sentinel, sentinel - spans, -1))
    starts = [list(targets).index(mark) for mark in marks]
    taken = {m: list(targets[i + 1 : j]) for m, i, j in zip(marks, starts, [*starts[1:], len(targets) - 1])}
    assert starts[0] == 0
    assert all(taken.values())
    assert [token for token in inputs if token in taken] == marks
    return [each for token in inputs[:-1] for each in taken.get(token, [token])]


def stripped(rows):
    return [row[row > 0] for row in rows]


# Span corruption.


@given(st.integers(2, 400), st.floats(0.0, 1.0), st.floats(0.5, 30.0), st.integers(0, 2**32))
def test_every_token_of_a_window_is_in_its_inputs_or_targets(length, noise, mean_span, seed):
    rng = np.random.default_rng(seed)
    # Tokens that repeat, ends among them.
    window = rng.integers(1, 259, length, dtype=np.int32)
    taken, spans = span_counts(length, noise, mean_span)

    inputs, targets = corrupt_spans(window, 5000, rng, noise=noise, mean_span=mean_span)

    assert inputs.dtype == targets.dtype == np.int32
    assert len(inputs) == length - taken + spans + 1
    assert len(targets) == taken + spans + 1
    assert spliced(inputs, targets, 5000, spans) == window.tolist()
    # What is kept comes first, and two spans never touch.
    assert inputs[0] == window[0]
    assert all(a <= 4000 or b <= 4000 for a, b in itertools.pairwise(inputs))


def test_a_share_of_15_in_100_is_taken_in_spans_of_3():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(100, 1000, 300)]
    counts = [span_counts(n) for n in lengths]
    sizes = []
    for n, (_, spans) in zip(lengths, counts):
        _, targets = corrupt_spans(np.full(n, 7, np.int32), 30000, rng)
        sizes += np.diff([*np.flatnonzero(targets > 7), len(targets) - 1]).tolist()
        assert len(sizes[-spans:]) == spans

    taken, spans = (sum(each) for each in zip(*counts))
    assert taken / sum(lengths) == pytest.approx(0.15, abs=0.001)
    assert taken / spans == pytest.approx(3.0, abs=0.03)
    assert np.mean(sizes) - 1 == pytest.approx(3.0, abs=0.03)
    # Of all sizes: nearly geometric, so a span of one token is the most frequent, and one in three.
    assert (np.array(sizes) == 2).mean() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.slow
def test_spans_stand_anywhere():
    """All ways to cut eight kept and two taken tokens into one pair or two, each about as often."""
    rng = np.random.default_rng(0)
    found = [corrupt_spans(np.arange(2, 12, dtype=np.int32), 99, rng, mean_span=1.0, noise=0.2)[1] for _ in range(2800)]

    _, counts = np.unique(np.array([targets[[1, 3]] for targets in found]), axis=0, return_counts=True)
    # Seven ways to cut eight; the last token is always taken.
    assert len(counts) == 7
    assert counts.min() > 320
    assert counts.max() < 480


@pytest.mark.parametrize(("length", "window", "targets"), [(512, 568, 114), (1024, 1137, 229), (256, 284, 58)])
def test_windows_are_those_that_t5_chooses(length, window, targets):
    assert window_of(length) == window
    assert full_target_length(length) == targets


def test_windows_fill_inputs_and_are_as_long_as_targets_allow():
    for encoder, target in itertools.product(range(3, 90), (3, 4, 7, 11, 20, 90)):
        window = window_of(encoder, target)
        rng = np.random.default_rng(0)
        inputs, targets = corrupt_spans(np.full(window, 2, np.int32), 1000, rng)
        longer = corrupt_spans(np.full(window + 1, 2, np.int32), 1000, rng)

        assert len(inputs) <= encoder
        assert len(targets) <= target
        assert len(longer[0]) > encoder or len(longer[1]) > target
        assert target < 90 or len(inputs) == encoder


# Text.


def test_text_is_bytes_that_can_be_put_together_again():
    """The source of a module of the standard library, of which every window is found again."""
    raw = Path(textwrap.__file__).read_bytes()
    window, spans = window_of(64, 32), span_counts(window_of(64, 32))[1]
    examples = read(textwrap.__file__, lengths=(64, 32))

    n = len(raw) // window
    held, epoch = len(examples.held_out) * 4, (n - len(examples.held_out) * 4) // 4
    found = [
        bytes(token - 3 for token in spliced(inputs, targets, 358, spans))
        for batch in (*first(examples, epoch), *examples.held_out)
        for inputs, targets in zip(stripped(batch.encoder), stripped(batch.targets))
    ]

    windows = [raw[i * window : (i + 1) * window] for i in range(n)]
    assert held == n // 40 * 4
    assert found[-held:] == windows[-held:]
    assert set(found[:-held]) <= set(windows[:-held])
    assert len(set(found[:-held])) == epoch * 4
    assert "textwrap.py" in examples.says
    assert f"{len(raw):,} bytes" in examples.says
    assert "sha256" in examples.says


def test_batches_have_t5s_shapes_and_decoder_inputs(tmp_path):
    (tmp_path / "t.txt").write_bytes(bytes(range(256)) * 100)

    batch = first(read(tmp_path / "t.txt", lengths=(128, 40)))[0]

    assert batch.encoder.shape == (4, 128)
    assert (batch.encoder > 0).all()
    assert batch.targets.shape == batch.decoder.shape == (4, sum(span_counts(window_of(128))) + 1)
    assert (batch.decoder[:, 0] == 0).all()
    assert (batch.decoder[:, 1:] == batch.targets[:, :-1]).all()
    assert batch.encoder.dtype == batch.targets.dtype == np.int32
    assert batch.compared.all()
    assert "t.txt" in batch.says


def test_batches_are_a_function_of_the_seed(tmp_path):
    (tmp_path / "t.txt").write_bytes(os.urandom(4000))
    one, two, other = (read(tmp_path / "t.txt", seed=seed) for seed in (3, 3, 4))

    # Of more than one epoch.
    assert same(first(one, 60), first(two, 60))
    assert same(first(one), first(one))
    assert not same(first(one), first(other))
    # What is measured with is the same for all seeds.
    assert same(one.held_out, other.held_out)


def test_large_text_is_kept_once(tmp_path):
    (tmp_path / "t.txt").write_bytes(bytes(1 << 20) * 24)
    tracemalloc.start()

    first(read(tmp_path / "t.txt"))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The bytes, a mask of a piece of them, and an order of the windows.
    assert peak < 2.2 * (24 << 20)


# Tokens.


@pytest.mark.parametrize("ready", [False, True])
def test_nothing_that_is_held_out_is_learned_from(tmp_path, ready):
    ids = np.arange(1, 2001).reshape(250, 8)
    named = {"inputs": ids, "targets": ids} if ready else {"tokens": ids}
    examples = read(arrays(tmp_path / "t.npz", **named), objective="next_token", vocab=2001, lengths=(8, 8))

    held = np.concatenate([batch.targets for batch in examples.held_out])
    learned = [np.concatenate([batch.targets for batch in first(examples, 56 * (i + 1))[56 * i :]]) for i in range(3)]

    # A tenth, in whole batches: 24 of 250 rows, the last ones. The other 226 make 56 batches.
    assert held.tolist() == ids[-24:].tolist()
    assert not set(held.reshape(-1)) & set(np.concatenate(learned).reshape(-1))
    for epoch in learned:
        assert len({tuple(row) for row in epoch}) == 224
    # Another order each time, and what was left out once is not forever.
    assert (learned[0] != learned[1]).any()
    assert (learned[1] != learned[2]).any()
    assert {tuple(row) for epoch in learned for row in epoch} == {tuple(row) for row in ids[:226]}


def test_much_data_holds_out_a_few_batches(tmp_path):
    path = arrays(tmp_path / "t.npz", tokens=np.ones(9000, np.int64))

    assert len(read(path, objective="next_token", lengths=(9, 9)).held_out) == 8
    assert len(read(path, objective="next_token", lengths=(9, 9), batch=500).held_out) == 1


def test_next_tokens_are_windows_of_the_stream(tmp_path):
    path = arrays(tmp_path / "t.npz", tokens=np.arange(1, 81))

    batch = read(path, objective="next_token", vocab=100, batch=2, lengths=(99, 10)).held_out[0]

    assert batch.targets.tolist() == [list(range(61, 71)), list(range(71, 81))]
    assert batch.decoder.tolist() == [[0, *range(61, 70)], [0, *range(71, 80)]]
    assert batch.encoder.tolist() == [[0], [0]]
    assert batch.target_segments is None


def test_rows_and_lines_of_tokens_are_one_stream_without_padding(tmp_path):
    rows = np.arange(1, 41).reshape(10, 4) * np.array([1, 1, 1, 0])
    flat = rows[rows > 0]
    files = (
        arrays(tmp_path / "rows.npz", tokens=rows.astype(np.uint16)),
        arrays(tmp_path / "flat.npz", tokens=flat),
        lines(tmp_path / "t.jsonl", {"tokens": flat[:7].tolist(), "id": 1}, {"tokens": [0, 0, *flat[7:].tolist(), 0]}),
    )

    found = [read(path, objective="next_token", batch=3, lengths=(5, 5)) for path in files]

    for examples in found:
        assert np.concatenate([first(examples, 1)[0].targets, examples.held_out[0].targets]).tolist()[3:] == [
            *flat[15:].reshape(3, 5).tolist()
        ]
        assert same(first(examples), first(found[0]))
        assert "30 tokens" in examples.says


def test_texts_of_lines_are_bytes_that_follow_on_each_other(tmp_path):
    # A separator of lines for Python, not for JSON.
    texts = ["Zwölf\u2028Boxkämpfer", "", " jagen Viktor 🥊 quer über den Sylter Deich."]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "t.txt").write_bytes("".join(texts).encode())
    asked = {"objective": "next_token", "batch": 2, "lengths": (5, 5)}

    one, two = read(path, **asked), read(tmp_path / "t.txt", **asked)

    assert same(first(one), first(two))
    assert same(one.held_out, two.held_out)


# Ready examples.


def test_examples_are_taken_as_they_are(tmp_path):
    examples = [{"inputs": [i, 1], "targets": [i, i, 1][: i % 2 + 2]} for i in range(10, 22)]
    # Without a target: nothing is learned from it.
    path = lines(tmp_path / "t.jsonl", *examples, {"inputs": [99], "targets": [0]})

    found = read(path, batch=3)

    assert found.held_out[0].encoder.tolist() == [[19, 1], [20, 1], [21, 1]]
    assert found.held_out[0].targets.tolist() == [[19, 19, 1], [20, 20, 0], [21, 21, 1]]
    assert found.held_out[0].decoder.tolist() == [[0, 19, 19], [0, 20, 20], [0, 21, 21]]
    assert 99 not in np.concatenate([batch.encoder for batch in first(found)])
    assert "13 rows of 2 and 3, 1 without targets left out" in found.says


def test_examples_are_cut_and_stay_packed(tmp_path):
    ids, segments = np.arange(1, 49).reshape(6, 8), np.tile([1, 1, 1, 2, 2, 2, 2, 3], (6, 1))
    path = arrays(
        tmp_path / "t.npz",
        encoder_input_tokens=ids,
        decoder_target_tokens=ids,
        encoder_segment_ids=segments,
        decoder_segment_ids=segments,
    )

    batch = read(path, batch=2, lengths=(7, 5)).held_out[0]

    assert batch.encoder.tolist() == ids[4:, :7].tolist()
    assert batch.targets.tolist() == ids[4:, :5].tolist()
    assert batch.target_segments.tolist() == segments[4:, :5].tolist()
    assert batch.encoder_segments.tolist() == segments[4:, :7].tolist()
    assert batch.decoder[0].tolist() == [0, 33, 34, 0, 36]


def test_decoders_need_no_inputs(tmp_path):
    path = lines(tmp_path / "t.jsonl", *({"targets": [i, 1], "targets_segment_ids": [1, 2]} for i in range(2, 10)))

    batch = read(path, objective="next_token", batch=2).held_out[0]

    assert batch.encoder.tolist() == [[0], [0]]
    assert batch.targets.tolist() == [[8, 1], [9, 1]]
    assert batch.decoder.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(Corrupt) as caught:
        read(path, batch=2)
    assert "inputs and targets are needed" in caught.value.details[0]


# What is refused.


@pytest.mark.parametrize(
    ("vocab", "given", "least"),
    [(384, None, 350), (359, None, 350), (358, None, 349), (259, None, 250), (32128, None, 350), (384, 300, 292)],
)
def test_sentinels_of_text_count_down(tmp_path, vocab, given, least):
    (tmp_path / "t.txt").write_bytes(b"fuse " * 400)
    spans = span_counts(window_of(160))[1]

    batch = first(read(tmp_path / "t.txt", vocab=vocab, sentinel=given, lengths=(160, 99)))[0]

    assert spans == 9
    assert sorted(set(batch.encoder[0][batch.encoder[0] > 130])) == list(range(least, least + spans))


@pytest.mark.parametrize(("vocab", "sentinel"), [(32128, 32099), (250112, 250099), (1000, 999)])
def test_sentinels_of_tokens_are_those_of_their_vocabulary(tmp_path, vocab, sentinel):
    path = arrays(tmp_path / "t.npz", tokens=np.arange(2, 802))

    assert first(read(path, vocab=vocab))[0].encoder.max() == sentinel


def test_sentinels_that_are_tokens_are_refused(tmp_path, monkeypatch):
    """Windows of 36 tokens have two spans: 99 and 98."""
    monkeypatch.setattr("fusectl.networks.examples._PIECE", 3)
    tokens = np.full((20, 20), 7)
    tokens[3, 4:6] = tokens[9, 1] = 98
    path = arrays(tmp_path / "t.npz", tokens=tokens)

    with pytest.raises(Incompatible, match=r"token 98 is one of the sentinels, 99 down to 98") as caught:
        read(path, vocab=100)
    assert caught.value.details[0] == "3 such tokens, first in row 3, at position 4"
    with pytest.raises(Incompatible, match="token 99 is one of the sentinels"):
        read(arrays(tmp_path / "other.npz", tokens=tokens + (tokens == 98)), vocab=100)
    # Beside them, on either side, they are tokens like others.
    assert read(path, vocab=101).held_out
    assert read(path, vocab=100, sentinel=97).held_out
    assert read(path, vocab=100, sentinel=3).held_out
    with pytest.raises(Incompatible, match="too few tokens for sentinels from 2 down"):
        read(path, vocab=100, sentinel=2)


BAD = [
    ("t.txt", b"", Corrupt, "the file is empty"),
    ("t.txt", b"x" * 100, Incompatible, "too little for a batch of 4"),
    ("t.jsonl", b"", Corrupt, "the file is empty"),
    ("t.jsonl", b'{"tokens": [1]}\nno json\n', Corrupt, "line 2, column 1: Expecting value"),
    ("t.jsonl", b'{"tokens": [1]}\n\n[1]\n', Corrupt, "line 3 is no object"),
    ("t.jsonl", b'{"tokens": [1]}\n{"text": "a"}\n', Corrupt, "line 2 has no 'tokens'"),
    ("t.jsonl", b'{"tokens": [1.5]}\n', Corrupt, "no list of integers"),
    ("t.jsonl", b'{"tokens": [9999999999]}\n', Corrupt, "more than 31 bits"),
    ("t.jsonl", b'{"tokens": [0, 0]}\n', Corrupt, "no token that is not padding"),
    ("t.jsonl", b'{"text": ""}\n', Corrupt, "no token that is not padding"),
    ("t.jsonl", b'{"text": 5}\n', Corrupt, "'text' of line 1 is no text"),
    ("t.jsonl", b'{"text": "\\ud800"}\n', Corrupt, "surrogates not allowed"),
    ("t.jsonl", b'{"text": "\xff"}\n', Corrupt, "can't decode byte 0xff"),
    ("t.jsonl", b'{"tokens": [5]}\n{"tokens": [6, 384, 385]}\n', Incompatible, "token 384 is not in the vocabulary"),
    (
        "t.jsonl",
        b'{"tokens": [5]}\n\n{"tokens": [6, 384, 385]}\n',
        Incompatible,
        "2 such tokens, first in line 3, at position 1",
    ),
    (
        "t.jsonl",
        b'{"tokens": [5, 6]}\n{"tokens": []}\n{"tokens": [384]}\n',
        Incompatible,
        "first in line 3, at position 0",
    ),
    ("t.jsonl", b'{"tokens": [5, -1]}\n', Incompatible, "token -1 is not in the vocabulary of 384"),
    ("t.jsonl", b'{"words": [5]}\n', Corrupt, "inputs and targets are needed"),
    ("t.jsonl", b'{"inputs": [5], "targets": [400]}\n', Incompatible, "1 such tokens, first in the targets of row 0"),
    (
        "t.jsonl",
        b'{"inputs": [5], "targets": [6]}\n' * 7,
        Incompatible,
        "7 rows of 1 and 1; 8 rows or windows are need",
    ),
    ("t.npz", b"PK\x03\x04 nothing", Corrupt, "no tokens in it"),
    ("t.npz", b"nothing", Corrupt, "no tokens in it"),
]


@pytest.mark.parametrize(("name", "content", "error", "says"), BAD)
def test_files_that_hold_nothing_to_learn_from_are_refused(tmp_path, name, content, error, says):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(error) as caught:
        read(tmp_path / name)

    assert says in " ".join((caught.value.message, *caught.value.details))
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", b"x" * 36 * 8),
        ("t.jsonl", b'{"tokens": [1, 383]}\n' * 144),
        ("t.jsonl", b'{"text": "\xc3\xbf"}\n' * 144),
        ("t.jsonl", b'{"inputs": [5], "targets": [6]}\n' * 8),
    ],
)
def test_files_that_hold_just_enough_are_not(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    # 383 is no sentinel then.
    examples = read(tmp_path / name, sentinel=382)

    assert len(examples.held_out) == 1
    assert first(examples)[0].encoder.shape[0] == 4


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        (np.ones((2, 3)), Corrupt, "float64 of shape [2, 3], not integers"),
        (np.ones((2, 3, 4), int), Corrupt, "int64 of shape [2, 3, 4], not integers"),
        (np.array(3), Corrupt, "not integers"),
        (np.ones(9, bool), Corrupt, "not integers"),
        (np.array([None]), Corrupt, "Object arrays"),
        (np.zeros((2, 3), int), Corrupt, "no token that is not padding"),
        (np.zeros((2, 0), int), Corrupt, "no token that is not padding"),
        (np.array([[5, 6], [7, 384]]), Incompatible, "1 such tokens, first in row 1, at position 1"),
        (np.array([5, 6, -7]), Incompatible, "1 such tokens, first at position 2"),
        (np.array([2**63], np.uint64), Incompatible, "token 9223372036854775808 is not"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path, tokens, error, says):
    with pytest.raises(error) as caught:
        read(arrays(tmp_path / "t.npz", tokens=tokens))

    assert says in " ".join((caught.value.message, *caught.value.details))


def test_absent_and_unreadable_files_are_refused(tmp_path):
    for name in (tmp_path / "absent", tmp_path, "", tmp_path / "t.txt:f"):
        with pytest.raises(NotFound, match="no file of tokens"):
            read(name)
    with pytest.raises(StorageError, match="cannot be read"):
        read("x" * 5000)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"batch": 0}, "a batch of 0"),
        ({"seed": -1}, "a seed of -1"),
        ({"lengths": (2, 9)}, "a length of 2: at least 3"),
        ({"lengths": (9, 2)}, "a length of 2: at least 3"),
        ({"lengths": (9, 0), "objective": "next_token"}, "a length of 0: at least 1"),
        ({"sentinel": 384}, "a sentinel of 384"),
        ({"sentinel": 1}, "a sentinel of 1"),
    ],
)
def test_sizes_that_make_no_example_are_refused(tmp_path, changed, says):
    (tmp_path / "t.txt").write_bytes(b"fuse " * 200)

    with pytest.raises(UsageError) as caught:
        read(tmp_path / "t.txt", **changed)

    assert says in caught.value.message
    assert read(tmp_path / "t.txt", batch=1, lengths=(3, 3), sentinel=383).held_out


def test_text_needs_a_vocabulary_of_bytes(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fuse " * 200)

    with pytest.raises(Incompatible, match="bytes as tokens need a vocabulary of 259, not of 258"):
        read(tmp_path / "t.txt", vocab=258)
    assert read(tmp_path / "t.txt", vocab=259).held_out


# Functions.


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current directory; what comes back is its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def write(source, name="own_examples"):
        names.append(name)
        (tmp_path / f"{name}.py").write_text("import numpy as np\n" + textwrap.dedent(source))
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


BATCHES = """
    calls = []

    def batches():
        calls.append(len(calls))
        for i in range(24):
            ids = np.full((2, 3), i + 2) + np.arange(2)[:, None] * 100
            yield {"encoder_input_tokens": ids, "decoder_target_tokens": ids[:, :2], "note": "two at once"}
"""


def test_a_functions_batches_are_taken_as_they_are(module):
    name = module(BATCHES)

    examples = read(f"{name}:batches", lengths=(4, 3))
    found = first(examples, 40)

    # Sixteen are looked at, and a quarter of them held out.
    assert [batch.encoder[0, 0] for batch in examples.held_out] == [2, 3, 4, 5]
    assert [batch.encoder[0, 0] for batch in found] == [*range(6, 26), *range(6, 26)]
    assert found[0].encoder.tolist() == [[6, 6, 6, 0], [106, 106, 106, 0]]
    assert found[0].targets.tolist() == [[6, 6, 0], [106, 106, 0]]
    assert found[0].decoder.tolist() == [[0, 6, 0], [0, 106, 0]]
    assert found[0].target_segments is None
    assert f"{name}:batches" in examples.says
    assert same(first(examples), first(examples))
    # It is called once to look at it, and once for every epoch.
    assert sys.modules[name].calls == list(range(1 + 2 + 1 + 1))


def test_rows_without_targets_are_left_out_of_a_functions_batches(module):
    name = module("""
        def batches():
            for i in range(2, 26):
                yield {"inputs": [[i], [i]], "targets": [[0], [i]]}
    """)

    examples = read(f"{name}:batches", lengths=(3, 3))

    assert [batch.targets[:, 0].tolist() for batch in examples.held_out] == [[2, 3], [4, 5], [6, 7]]
    assert [batch.targets[:, 0].tolist() for batch in first(examples, 2)] == [[8, 9], [10, 11]]


def test_a_functions_examples_are_put_into_batches(module):
    name = module("""
        def examples():
            return [{"inputs": [i, 1], "targets": list(range(2, 2 + i % 7)) + [1]} for i in range(2, 42)]
    """)

    examples = read(f"{name}:examples", lengths=(3, 4))
    found = np.concatenate([batch.encoder for batch in first(examples, 16)])

    assert [batch.encoder[:, 0].tolist() for batch in examples.held_out] == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert found.tolist() == [[i, 1, 0] for i in [*range(10, 42), *range(10, 42)]]
    assert examples.held_out[0].targets.tolist() == [[2, 3, 1, 0], [2, 3, 4, 1], [2, 3, 4, 5], [2, 3, 4, 5]]


def test_what_a_function_shuffles_stays_held_out(module):
    name = module("""
        generator = np.random.default_rng(0)

        def examples():
            for i in generator.permutation(60):
                yield {"inputs": [i + 2], "targets": [i + 2]}
    """)

    examples = read(f"{name}:examples")
    held = {int(row[0]) for batch in examples.held_out for row in batch.encoder}
    learned = [int(row[0]) for batch in first(examples, 50) for row in batch.encoder]

    assert len(held) == 12
    assert not held & set(learned)
    assert len(set(learned)) == 48


def test_a_functions_batches_may_be_packed(module):
    name = module("""
        def batches():
            for i in range(2, 9):
                ids, segments = np.full((1, 4), i), np.array([[1, 1, 2, 2]])
                yield {"inputs": ids, "targets": ids, "inputs_segment_ids": segments, "targets_segment_ids": segments}

        def mixed():
            yield from batches()
            yield {"inputs": np.ones((1, 4), int), "targets": np.ones((1, 4), int)}
    """)

    batch = read(f"{name}:batches", lengths=(5, 4)).held_out[0]

    assert batch.encoder_segments.tolist() == [[1, 1, 2, 2, 0]]
    assert batch.target_segments.tolist() == [[1, 1, 2, 2]]
    assert batch.decoder.tolist() == [[0, 2, 0, 2]]
    with pytest.raises(Corrupt, match="item 7 is packed and others are not"):
        read(f"{name}:mixed", lengths=(5, 4))


@pytest.mark.parametrize(
    ("item", "decoder"),
    [
        ('{"tokens": ids}', [0, 2, 2]),
        ('{"targets": ids}', [0, 2, 2]),
        ('{"decoder_target_tokens": ids, "decoder_input_tokens": ids + 1}', [3, 3, 3]),
        ('{"tokens": ids + 1, "targets": ids}', [3, 3, 3]),
        ('{"inputs": ids + 5, "targets": ids}', [0, 2, 2]),
    ],
)
def test_functions_for_decoders_need_no_inputs(module, item, decoder):
    name = module(f"def f():\n    for i in range(2, 9):\n        ids = np.full((2, 3), i)\n        yield {item}\n")

    batch = read(f"{name}:f", objective="next_token", lengths=(9, 3)).held_out[0]

    assert batch.encoder.tolist() == [[0], [0]]
    assert batch.targets.tolist() == [[2, 2, 2]] * 2
    assert batch.decoder.tolist() == [decoder] * 2


FAILING = """
    def _of(*items):
        return lambda: iter(items)

    good = {"inputs": np.full((2, 3), 5), "targets": np.full((2, 3), 6)}
    nothing = _of()
    few = _of(good)
    enough = _of(good, {"inputs": np.full((2, 3), 6), "targets": np.full((2, 3), 6)})
    alike = _of(good, good)
    one_and_a_half = _of(good, {"inputs": [5], "targets": [6]})
    words = _of("words")
    names = _of({"x": [1]})
    floats = _of({"inputs": [1.5], "targets": [1]})
    ragged = _of({"inputs": [[1], [1, 2]], "targets": [[1], [1]]})
    outside = _of(good, {"inputs": [5], "targets": [384]})
    number = 5

    def one():
        return 1

    def fails():
        raise RuntimeError("no store")

    def breaks():
        yield good
        raise OSError("cut off")

    def needs(path):
        return path

    def late():
        for i in range(2, 40):
            yield {"inputs": [i], "targets": [5 if i < 30 else 500]}

    _once = iter([{"inputs": [i], "targets": [i]} for i in range(2, 78)])

    def once():
        return _once
"""


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        ("nothing", Corrupt, "no examples came back"),
        ("few", Incompatible, "2 examples came back; 4 are needed"),
        ("one_and_a_half", Incompatible, "3 examples came back; 4 are needed"),
        ("words", Corrupt, "item 0 holds no examples str, not a mapping"),
        ("names", Corrupt, "inputs and targets are needed; it has nothing"),
        ("floats", Corrupt, "encoder: float64 of shape [1, 1], not integers"),
        ("ragged", Corrupt, "item 0 holds no examples"),
        ("outside", Incompatible, "item 1: token 384 is not in the vocabulary of 384"),
        ("number", UsageError, "no function, but int"),
        ("absent", UsageError, "no absent in the module"),
        ("one", Corrupt, "nothing to iterate over came back TypeError"),
        ("fails", Corrupt, "the function failed RuntimeError: no store"),
        ("breaks", Corrupt, "failed at item 1 OSError: cut off"),
        ("needs", Corrupt, "missing 1 required positional argument"),
    ],
)
def test_functions_that_return_no_examples_are_refused(module, function, error, says):
    data = f"{module(FAILING)}:{function}"

    with pytest.raises(error) as caught:
        read(data)

    assert says in " ".join((caught.value.message, *caught.value.details))
    assert data in caught.value.message
    assert read(data.replace(function, "enough")).held_out


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        ("alike", Corrupt, "only examples that are held out"),
        ("once", Corrupt, "called again, it returned nothing to learn from"),
        ("late", Incompatible, "item 28: token 500 is not in the vocabulary"),
    ],
)
def test_functions_that_fail_later_on_are_refused_then(module, function, error, says):
    examples = read(f"{module(FAILING)}:{function}", batch=1)

    with pytest.raises(error) as caught:
        first(examples, 100)

    assert says in " ".join((caught.value.message, *caught.value.details))


def test_modules_that_are_absent_or_fail_are_refused(module):
    for data in ("no_such_module_of_that_name:f", "os.no_such_module:f"):
        with pytest.raises(UsageError, match="no such file, and no module") as caught:
            read(data)
        assert caught.value.exit_code == 2
    for i, (source, says) in enumerate(
        (
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("import no_such_module_of_that_name", "ModuleNotFoundError"),
            ("raise SystemExit(0)", "SystemExit: 0"),
            ("def f(:", "SyntaxError"),
        )
    ):
        with pytest.raises(Corrupt, match="the module cannot be imported") as caught:
            read(f"{module(source, f'own_examples_{i}')}:f")
        assert says in caught.value.details[0]


def test_a_file_of_that_name_is_a_file(module, tmp_path):
    name = module("raise SystemExit(1)")
    (tmp_path / f"{name}:f").write_bytes(b"fuse " * 200)

    assert "1,000 bytes" in read(f"{name}:f").says
    assert name not in sys.modules
