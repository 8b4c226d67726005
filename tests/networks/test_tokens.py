"""Batches of tokens: drawn, read from files, refused."""

import json

import numpy as np
import pytest

from fusectl.errors import Corrupt, Incompatible, NotFound
from fusectl.networks.tokens import random_tokens, read_tokens


def lines(path, *examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def test_random_tokens_hold_full_padded_and_packed_rows():
    tokens = random_tokens(50, 8, 16, 0)

    assert tokens.encoder.shape == tokens.targets.shape == (8, 16)
    assert 0 <= tokens.encoder.min() <= tokens.encoder.max() < 50
    for row in (0, 4):
        assert (tokens.encoder[row, 12:] == 0).all()
        assert (tokens.targets[row] > 0).all()
        assert (tokens.targets[row + 1, 12:] == 0).all()
        assert (tokens.encoder[row + 1] > 0).all()
        assert sorted(set(tokens.target_segments[row + 2])) == [1, 2]
        assert (tokens.encoder[row + 3] > 0).all()
        assert (tokens.targets[row + 3] > 0).all()
    # Shifted right by one; a packed example begins anew.
    assert (tokens.decoder[:, 0] == 0).all()
    assert (tokens.decoder[3, 1:] == tokens.targets[3, :-1]).all()
    assert tokens.decoder[2, 8] == 0
    assert (tokens.decoder[2, 9:] == tokens.targets[2, 8:-1]).all()


def test_random_tokens_are_a_function_of_their_seed():
    one, two, other = (random_tokens(50, 4, 8, seed) for seed in (3, 3, 4))

    assert (one.encoder == two.encoder).all()
    assert (one.encoder != other.encoder).any()


def test_lines_of_json_are_padded_to_the_longest(tmp_path):
    path = lines(
        tmp_path / "t.jsonl", {"inputs": [3, 4, 1], "targets": [5, 1]}, {"inputs": [7], "targets": [8, 9, 1], "id": 7}
    )

    tokens = read_tokens(path, 10, None, None)

    assert tokens.encoder.tolist() == [[3, 4, 1], [7, 0, 0]]
    assert tokens.targets.tolist() == [[5, 1, 0], [8, 9, 1]]
    assert tokens.decoder.tolist() == [[0, 5, 1], [0, 8, 9]]
    assert tokens.compared.sum() == 5
    assert "2 rows" in tokens.says
    assert "sha256" in tokens.says


def test_segments_of_packed_lines_keep_their_examples_apart(tmp_path):
    example = {"inputs": [3, 4], "targets": [5, 6, 7], "inputs_segment_ids": [1, 2], "targets_segment_ids": [1, 2, 2]}

    tokens = read_tokens(lines(tmp_path / "t.jsonl", example), 10, None, None)

    assert tokens.decoder.tolist() == [[0, 0, 6]]
    assert tokens.encoder_segments.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "names", [("enc", "tgt", "dec"), ("encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens")]
)
def test_arrays_keep_their_decoder_inputs_and_are_cut(tmp_path, names):
    encoder, targets = np.arange(1, 13).reshape(3, 4), np.arange(1, 10).reshape(3, 3)
    np.savez(tmp_path / "t.npz", **dict(zip(names, (encoder, targets, targets + 1), strict=True)))

    tokens = read_tokens(str(tmp_path / "t.npz"), 20, 2, 3)

    assert tokens.encoder.tolist() == encoder[:2, :3].tolist()
    assert tokens.decoder.tolist() == (targets[:2, :3] + 1).tolist()


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("", Corrupt, "the file is empty"),
        ("\n\n", Corrupt, "the file is empty"),
        ("not json\n", Corrupt, "Expecting value"),
        ("[1, 2]\n", Corrupt, "no object"),
        ('{"inputs": [1, 2]}\n', Corrupt, "inputs and targets are needed"),
        ('{"inputs": [1.5], "targets": [1]}\n', Corrupt, "no list of integers"),
        ('{"inputs": [true], "targets": [1]}\n', Corrupt, "no list of integers"),
        ('{"inputs": [1], "targets": [0]}\n', Corrupt, "no target that is not padding"),
        ('{"inputs": [1], "targets": [1]}\n{"inputs": [1]}\n', Corrupt, "example 1 has no 'targets'"),
        ('{"inputs": [0], "targets": [1]}\n', Corrupt, "no input that is not padding"),
        (
            '{"inputs": [1], "targets": [1, 2], "inputs_segment_ids": [1], "targets_segment_ids": [1]}\n',
            Corrupt,
            "segments of the targets of shape [1, 1] beside [1, 2]",
        ),
        ('{"inputs": [1], "targets": [1], "targets_segment_ids": [1]}\n', Corrupt, "belong together"),
        ('{"inputs": [1], "targets": [1, 50]}\n', Incompatible, "token 50 is not in the vocabulary of 50"),
        ('{"inputs": [3, -1], "targets": [1]}\n', Incompatible, "token -1 is not in the vocabulary"),
        ('{"inputs": [99999999999999], "targets": [1]}\n', Corrupt, "more than 31 bits"),
    ],
)
def test_files_without_tokens_are_refused(tmp_path, content, error, says):
    (tmp_path / "t.jsonl").write_text(content)

    with pytest.raises(error) as caught:
        read_tokens(str(tmp_path / "t.jsonl"), 50, None, None)

    assert says in " ".join((caught.value.message, *caught.value.details))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"inputs": np.ones((2, 3))}, "not integers"),
        ({"inputs": np.ones((2, 3), int), "targets": np.ones((3, 3), int)}, "2 rows of inputs, 3 of targets"),
        ({"inputs": np.ones(3, int), "targets": np.ones(3, int)}, "not integers (batch, length)"),
        ({"enc": np.ones((1, 2), int), "tgt": np.ones((1, 2), int), "dec": np.ones((1, 3), int)}, "decoder inputs"),
        ({"a": np.ones(1)}, "inputs and targets are needed; it has a"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "t.npz", **arrays)

    with pytest.raises(Corrupt) as caught:
        read_tokens(str(tmp_path / "t.npz"), 50, None, None)

    assert says in caught.value.details[0]


def test_damaged_archives_and_absent_files_are_refused(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 nothing")
    np.savez(tmp_path / "o.npz", inputs=np.array([None]), targets=np.array([None]))

    for name in ("t.npz", "o.npz"):
        with pytest.raises(Corrupt, match="no tokens in it"):
            read_tokens(str(tmp_path / name), 50, None, None)
    for name in ("absent", "", "~nobody-of-this-name/t.npz"):
        with pytest.raises(NotFound, match="no file of tokens"):
            read_tokens(str(tmp_path / name), 50, None, None)
