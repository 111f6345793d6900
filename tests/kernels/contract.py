"""What every backend must do, over the declared cases: subclassed once per backend."""

import pytest
import torch

from fslora_kernels import sketched_linear
from fslora_kernels.ops.sketched_linear.cases import CASES, Case
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget, inputs, value_and_gradients

WITHOUT_DROPOUT = [case for case in CASES if not case.dropout]
DROPOUT = [case for case in CASES if case.dropout]


class SketchedLinearContract:
    implementation: str
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def dy(self, case: Case, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(case.tokens, case.out_features, generator=generator, dtype=torch.float64)
        return dy.to(self.device, dtype)

    def call(self, **arguments):
        return sketched_linear(**arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=lambda case: case.name)
    def test_value_and_gradients_within_the_budget(self, case):
        for dtype in self.dtypes:
            arguments = inputs(case, dtype, device=self.device)
            exact_arguments = {
                name: value.double() if torch.is_tensor(value) and name != "index" else value
                for name, value in arguments.items()
            }
            dy = self.dy(case, dtype)
            actual = value_and_gradients(self.call, arguments, dy)
            eager = value_and_gradients(reference, arguments, dy)
            exact = value_and_gradients(reference, exact_arguments, dy.double())
            assert actual.keys() == exact.keys()
            for name, value in actual.items():
                check_error_budget(
                    value, eager[name], exact[name], name=f"{case.name} {dtype} {name}"
                )

    def mask(self, tokens, features, *, dropout, seed):
        """Which features are kept, shown by factors that change nothing."""
        one = torch.eye(features, device=self.device)
        x = torch.ones(tokens, features, device=self.device)
        return self.call(
            x=x, weight=None, lora_a=one, lora_b=one, dropout=dropout, seed=seed
        ).bool()

    @pytest.mark.parametrize("case", DROPOUT, ids=lambda case: case.name)
    def test_dropout_is_one_mask_in_value_and_gradients(self, case):
        kept = self.mask(case.tokens, case.in_features, dropout=case.dropout, seed=7)
        dropping = {"dropout": case.dropout, "seed": 7}
        for dtype in self.dtypes:
            arguments = inputs(case, dtype, device=self.device)
            exact_arguments = {
                name: value.double() if torch.is_tensor(value) and name != "index" else value
                for name, value in arguments.items()
            }
            dy = self.dy(case, dtype)
            masked = {"kept": kept, "dropout": case.dropout}
            actual = value_and_gradients(self.call, {**arguments, **dropping}, dy)
            eager = value_and_gradients(reference, {**arguments, **masked}, dy)
            exact = value_and_gradients(reference, {**exact_arguments, **masked}, dy.double())
            for name, value in actual.items():
                check_error_budget(
                    value, eager[name], exact[name], name=f"{case.name} {dtype} {name}"
                )

    def test_dropout_drops_its_share_and_follows_the_seed(self):
        first, again, other = (self.mask(400, 64, dropout=0.3, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        deviation = (0.3 * 0.7 / first.numel()) ** 0.5
        assert abs(first.float().mean() - 0.7) < 5 * deviation
        assert abs(other.float().mean() - 0.7) < 5 * deviation
        both = (first & other).float().mean()
        assert abs(both - 0.7**2) < 5 * (0.49 * 0.51 / first.numel()) ** 0.5
        assert not torch.equal(first[0], first[1])

    def test_gradients_are_zero_outside_the_index(self):
        case = next(case for case in CASES if case.name == "half")
        arguments = inputs(case, torch.float32, device=self.device)
        gradients = value_and_gradients(self.call, arguments, self.dy(case, torch.float32))
        outside = torch.ones(case.rank, dtype=torch.bool, device=self.device)
        outside[arguments["index"]] = False
        assert gradients["lora_a"][outside].eq(0).all()
        assert gradients["lora_b"][:, outside].eq(0).all()
        assert gradients["lora_a"][~outside].ne(0).any(dim=1).all()
        assert gradients["lora_b"][:, ~outside].ne(0).any(dim=0).all()

    def test_two_runs_are_bit_equal(self):
        case = next(case for case in CASES if case.name == "odd_everything")
        arguments = inputs(case, torch.float32, device=self.device)
        dy = self.dy(case, torch.float32)
        first, second = (value_and_gradients(self.call, arguments, dy) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name

    @pytest.mark.parametrize("dropout", [0.0, 0.25])
    @pytest.mark.parametrize("wanted", [("x",), ("x", "lora_a"), ("lora_b",)], ids="+".join)
    def test_gradients_do_not_depend_on_what_else_is_wanted(self, wanted, dropout):
        case = next(case for case in CASES if case.name == "half")
        arguments = inputs(case, torch.float32, device=self.device)
        arguments |= {"dropout": dropout, "seed": 3}
        dy = self.dy(case, torch.float32)
        every = value_and_gradients(self.call, arguments, dy)
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        y = self.call(**(arguments | leaves))
        for name, found in zip(
            wanted, torch.autograd.grad(y, list(leaves.values()), dy), strict=True
        ):
            assert torch.equal(found, every[name]), name

    def test_factors_of_another_dtype_keep_theirs_in_the_gradients(self):
        case = next(case for case in CASES if case.name == "half")
        exact_arguments = inputs(case, torch.float64, device=self.device)
        low = {
            name: value.half() if name in ("x", "weight") else value
            for name, value in inputs(case, torch.float32, device=self.device).items()
        }
        dy = self.dy(case, torch.float16)
        actual = value_and_gradients(self.call, low, dy)
        eager = value_and_gradients(reference, inputs(case, torch.float16, device=self.device), dy)
        exact = value_and_gradients(reference, exact_arguments, dy.double())
        assert actual["y"].dtype == actual["x"].dtype == torch.float16
        assert actual["lora_a"].dtype == actual["lora_b"].dtype == torch.float32
        for name, value in actual.items():
            check_error_budget(
                value.to(eager[name].dtype), eager[name], exact[name], name=name, factor=3.0
            )

    @pytest.mark.parametrize("base", [True, False])
    def test_small_gradients_of_float32_factors_on_a_float16_input_survive(self, base):
        """As in PEFT: dy Bᵀ, a product of two small numbers, is zero in float16."""
        case = Case("small gradients", 64, 96, 80, 8, 4, bias=True, base=base)
        arguments = inputs(case, torch.float32, device=self.device)
        arguments["lora_b"] *= 1e-4
        low = {
            name: value.half() if name in ("x", "weight", "bias") and value is not None else value
            for name, value in arguments.items()
        }
        dy = self.dy(case, torch.float32) * 1e-6
        actual = value_and_gradients(self.call, low, dy)
        wanted = value_and_gradients(reference, arguments, dy.half().float())
        for name in ("lora_a", "lora_b"):
            relative = (actual[name] - wanted[name]).norm() / wanted[name].norm()
            assert actual[name].dtype == torch.float32
            assert relative < 1e-3, name
        assert actual["y"].dtype == actual["x"].dtype == torch.float16
