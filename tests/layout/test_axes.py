"""The notation for axes and paths, and what it says when it cannot be read."""

import pytest

from fusectl.layout.axes import PatternError, expand, parse_axes


def test_axes_keep_the_order_of_storage_and_the_arrow_says_the_sides():
    spec = parse_axes("heads layers kv -> embed")

    assert spec.axes == ("heads", "layers", "kv", "embed")
    assert spec.inputs == {"heads", "kv"}
    assert spec.outputs == {"embed"}


def test_a_norm_reads_nothing():
    assert parse_axes("-> embed layers").inputs == frozenset()


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("embed mlp", "no arrow", 9),
        ("a -> b -> c", "second arrow", 7),
        ("embed -> embed", "stands twice", 9),
        ("embed -> Mlp", "no axis name", 9),
    ],
)
def test_a_pattern_that_cannot_be_read_is_shown_with_a_caret(text, message, caret):
    with pytest.raises(PatternError, match=message) as error:
        parse_axes(text)

    _, shown, pointer = str(error.value).splitlines()
    assert shown == f"  {text}"
    assert pointer.index("^") == caret + 2


def test_braces_multiply():
    assert expand("{a,b}/x_{0,1}") == ("a/x_0", "a/x_1", "b/x_0", "b/x_1")


@pytest.mark.parametrize(
    ("pattern", "message", "caret"),
    [
        ("a/{b/c", "without its partner", 2),
        ("{a,b}/{c", "without its partner", 6),
        ("{a,b}/c}", "without its partner", 7),
        ("{a,{b}}", "without its partner", 0),
        ("a_#/{b,c_#}", "second #", 9),
        ("x/" + "{a,b}" * 7, "more than 100 names", 2),
    ],
)
def test_a_path_that_cannot_be_read_is_shown_with_a_caret(pattern, message, caret):
    with pytest.raises(PatternError, match=message) as error:
        expand(pattern)

    assert error.value.at == caret


def test_alternatives_may_have_a_number_each():
    assert expand("{a_#,b_#}/c") == ("a_#/c", "b_#/c")
