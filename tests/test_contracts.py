"""The contracts, over everything that fusectl brings along."""

from dataclasses import replace

import numpy as np
import pytest
from models import checkpoint

from fusectl.families.registry import FAMILIES, family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.layout.fill import Fill
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion, plan_self_fusion
from fusectl.operations.ligo import begin_operator, plan_with_operator
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.operations.stack import plan_stack
from fusectl.planning.options import Options
from fusectl.rules.fusion import line_up
from fusectl.sources.operator import open_operator, save_operator
from fusectl.testing import contracts
from fusectl.testing.contracts import FamilyTests, FormatTests, OperationTests
from fusectl.testing.evaluate import evaluate_plan
from fusectl.verbs import VERBS
from fusectl.writing.carrying_out import carry_out


class TestFamilies(FamilyTests):
    families = FAMILIES


class TestFormats(FormatTests):
    formats = tuple(FORMATS)


@pytest.mark.slow
class TestFuse(OperationTests):
    verb = "fuse"

    def plan(self, at, options):
        return plan_fusion([checkpoint(at / "a", seed=1), checkpoint(at / "b", seed=2)], options)


class TestSelfFuse(OperationTests):
    verb = "self-fuse"

    def plan(self, at, options):
        return plan_self_fusion(checkpoint(at / "a"), options, copies=3)


@pytest.mark.slow
class TestNoiseFill(OperationTests):
    verb = "noise-fill"

    def plan(self, at, options):
        fused = plan_self_fusion(checkpoint(at / "a"), Options(), copies=2)
        carry_out(*fused, at / "fused", sync=False)
        return plan_noise_fill(str(at / "fused"), replace(options, fill=Fill("gaussian", 0.1, 3)))


@pytest.mark.slow
class TestConvert(OperationTests):
    verb = "convert"

    def plan(self, at, options):
        return plan_conversion(checkpoint(at / "a", format="orbax-zarr3"), replace(options, format="t5x"))


class TestStack(OperationTests):
    verb = "stack"

    def plan(self, at, options):
        return plan_stack(checkpoint(at / "a"), options, how="identity", layers=5)


@pytest.mark.slow
class TestLigo(OperationTests):
    verb = "ligo"

    def plan(self, at, options):
        source = checkpoint(at / "a")
        sizes = {"embed": 20, "heads": 4, "mlp": 30}
        growing, _, start = begin_operator(source, sizes, 4, {}, "pinv", "random", 0, options)
        save_operator(start, growing, at / "operator")
        return plan_with_operator(source, open_operator(str(at / "operator")), options)


def test_every_operation_has_its_contract():
    classes = {each.verb for each in OperationTests.__subclasses__()}
    assert classes == set(VERBS)


# ---- controls: contracts that are broken are found


def test_a_norm_before_the_head_that_is_not_divided_breaks_the_contract_of_families(monkeypatch):
    monkeypatch.setattr(
        contracts, "line_up", lambda trees, weights, labels: line_up(trees, [1.0] * len(weights), labels)
    )
    with pytest.raises(AssertionError, match="decoder_norm"):
        TestFamilies().test_copies_compute_what_the_source_does(family_named("t5-1.1"))


def test_another_value_than_planned_breaks_the_contract_of_operations(monkeypatch, tmp_path):
    def off(plan, sources):
        found = evaluate_plan(plan, sources)
        name = max(found, key=lambda name: found[name].size)
        return {**found, name: found[name] * np.float32(1 + 1e-5)}

    monkeypatch.setattr(contracts, "evaluate_plan", off)
    with pytest.raises(AssertionError):
        TestSelfFuse().test_what_is_written_is_what_was_planned(tmp_path)


def test_a_proof_that_notices_nothing_breaks_the_contract_of_operations(monkeypatch, tmp_path):
    monkeypatch.setattr(contracts, "_flip", lambda opened, name: None)
    with pytest.raises(AssertionError):
        TestSelfFuse().test_the_proof_passes_and_fails_for_one_changed_value(tmp_path)


def test_a_format_that_rounds_breaks_its_contract(monkeypatch, tmp_path):
    monkeypatch.setattr(contracts, "open_checkpoint", lambda path: rounding(open_checkpoint(path)))
    with pytest.raises(AssertionError):
        TestFormats().test_values_come_back(tmp_path, "t5x", {})


def rounding(opened):
    read = opened.read
    opened.read = lambda name, region=None: read(name, region).astype(np.int8).astype(opened.leaves[name].dtype)
    return opened
