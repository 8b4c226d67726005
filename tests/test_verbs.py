"""The rows of operations: what they name is there, and takes what the command line gives it."""

import inspect
from dataclasses import fields
from typing import get_args

import pytest

from fusectl.cli import MODULES
from fusectl.operations.routes import Larger
from fusectl.planning.plan import Plan
from fusectl.verbs import VERBS, Made, Verb, operation
from fusectl.verification import check_of


def test_every_operation_is_a_command():
    assert set(VERBS) <= set(MODULES)


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_the_planner_takes_what_the_row_gives_it(verb: Verb):
    parameters = list(inspect.signature(verb.planner()).parameters.values())
    assert next(each.name for each in parameters) in {"path", "paths"}
    assert "options" in {each.name for each in parameters}
    if verb.options is not None:
        own = verb.options()
        taken = {each.name: each.default for each in parameters}
        assert own.given().items() <= taken.items(), "the same defaults"
        assert fields(own)
    assert Plan.__name__ in str(inspect.signature(verb.planner()).return_annotation)


@pytest.mark.parametrize("kind", get_args(Made))
def test_every_kind_of_origin_has_a_check_of_its_own(kind):
    check = check_of(object.__new__(kind))
    assert check.__module__ == f"fusectl.verification.{kind.__name__.lower()}"
    assert list(inspect.signature(check).parameters) == ["fused", "declared", "settings", "progress", "report"]
    assert kind in {verb.made for verb in VERBS.values()}


@pytest.mark.parametrize("route", [answer for verb in VERBS.values() for answer in verb.routes.values()])
def test_routes_answer(route):
    (parameter,) = inspect.signature(operation(route)).parameters.values()
    assert parameter.annotation == Larger.__name__
