"""The contracts, over everything that fusectl brings along."""

from dataclasses import replace

from models import checkpoint

from fusectl.families.registry import FAMILIES
from fusectl.formats.registry import FORMATS
from fusectl.layout.fill import Fill
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion, plan_self_fusion
from fusectl.operations.ligo import begin_operator, plan_with_operator
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.operations.stack import plan_stack
from fusectl.planning.options import Options
from fusectl.sources.operator import open_operator, save_operator
from fusectl.testing.contracts import FamilyTests, FormatTests, OperationTests
from fusectl.verbs import VERBS
from fusectl.writing.carrying_out import carry_out


class TestFamilies(FamilyTests):
    families = FAMILIES


class TestFormats(FormatTests):
    formats = tuple(FORMATS)


class TestFuse(OperationTests):
    verb = "fuse"

    def plan(self, at, options):
        return plan_fusion([checkpoint(at / "a", seed=1), checkpoint(at / "b", seed=2)], options)


class TestSelfFuse(OperationTests):
    verb = "self-fuse"

    def plan(self, at, options):
        return plan_self_fusion(checkpoint(at / "a"), options, copies=3)


class TestNoiseFill(OperationTests):
    verb = "noise-fill"

    def plan(self, at, options):
        fused = plan_self_fusion(checkpoint(at / "a"), Options(), copies=2)
        carry_out(*fused, at / "fused", sync=False)
        return plan_noise_fill(str(at / "fused"), replace(options, fill=Fill("gaussian", 0.1, 3)))


class TestConvert(OperationTests):
    verb = "convert"

    def plan(self, at, options):
        return plan_conversion(checkpoint(at / "a", format="orbax-zarr3"), replace(options, format="t5x"))


class TestStack(OperationTests):
    verb = "stack"

    def plan(self, at, options):
        return plan_stack(checkpoint(at / "a"), options, how="identity", layers=5)


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
