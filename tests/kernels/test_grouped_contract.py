"""What every backend of grouped_sketched_linear must do: subclassed once per backend."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fslora_kernels import grouped_sketched_linear, sketched_linear
from fslora_kernels.ops.grouped_sketched_linear.cases import CASES, Case, inputs
from fslora_kernels.ops.grouped_sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget, value_and_gradients


def named(name):
    return next(case for case in CASES if case.name == name)


def exact(arguments):
    """The same values in float64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def draw_dy(case, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shape = sum(case.tokens), case.out_features
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def group(arguments, number):
    """The arguments of one group alone, its rank rows as a pool of its own."""
    rows = slice(*arguments["token_offsets"][number : number + 2])
    ranks = slice(*arguments["rank_offsets"][number : number + 2])
    chosen = ranks if arguments["index"] is None else arguments["index"][ranks]
    return arguments | {
        "x": arguments["x"][rows],
        "lora_a": arguments["lora_a"][chosen],
        "lora_b": arguments["lora_b"][chosen],
        "token_offsets": [0, rows.stop - rows.start],
        "rank_offsets": [0, ranks.stop - ranks.start],
        "index": None,
        "scale": arguments["scale"][number : number + 1],
    }


class GroupedContract:
    implementation: str
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def call(self, **arguments):
        return grouped_sketched_linear(**arguments, implementation=self.implementation)

    def run(self, case, dtype=torch.float32):
        arguments = inputs(case, dtype, device=self.device)
        dy = draw_dy(case, dtype, self.device)
        return arguments, dy, value_and_gradients(self.call, arguments, dy)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_value_and_gradients_within_the_budget(self, case):
        for dtype in self.dtypes:
            arguments, dy, actual = self.run(case, dtype)
            eager = value_and_gradients(reference, arguments, dy)
            wanted = value_and_gradients(reference, exact(arguments), dy.double())
            assert actual.keys() == wanted.keys()
            for name, value in actual.items():
                check_error_budget(
                    value, eager[name], wanted[name], name=f"{case.name} {dtype} {name}"
                )

    def test_it_is_one_sketched_linear_per_group(self):
        arguments, _, actual = self.run(named("one_to_all_ranks"))
        for number, rows in enumerate(pairwise(arguments["token_offsets"])):
            alone = group(arguments, number)
            one = sketched_linear(
                alone["x"],
                alone["weight"],
                alone["lora_a"],
                alone["lora_b"].t(),
                bias=alone["bias"],
                scale=alone["scale"][0],
                implementation=self.implementation,
            )
            torch.testing.assert_close(actual["y"][slice(*rows)], one, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["compact_leaves", "unequal_groups"])
    def test_an_adapters_result_does_not_depend_on_its_batch_mates(self, name):
        case = replace(named(name), base=False)
        arguments, dy, batch = self.run(case)
        for number in range(len(case.tokens)):
            rows = slice(*arguments["token_offsets"][number : number + 2])
            ranks = slice(*arguments["rank_offsets"][number : number + 2])
            alone = value_and_gradients(self.call, group(arguments, number), dy[rows])
            for of, part in (("y", rows), ("x", rows), ("lora_a", ranks), ("lora_b", ranks)):
                assert torch.equal(batch[of][part], alone[of]), f"{of} of group {number}"

    def test_permuting_the_groups_permutes_the_result(self):
        case = replace(named("one_to_all_ranks"), base=False)
        arguments, dy, actual = self.run(case)
        order = (2, 0, 3, 1)
        tokens = [range(*bounds) for bounds in pairwise(arguments["token_offsets"])]
        ranks = [range(*bounds) for bounds in pairwise(arguments["rank_offsets"])]
        rows = [row for number in order for row in tokens[number]]
        permuted = arguments | {
            "x": arguments["x"][rows],
            "token_offsets": [0, *accumulate(len(tokens[number]) for number in order)],
            "rank_offsets": [0, *accumulate(len(ranks[number]) for number in order)],
            "index": arguments["index"][[rank for number in order for rank in ranks[number]]],
            "scale": [arguments["scale"][number] for number in order],
        }
        result = value_and_gradients(self.call, permuted, dy[rows])
        for of in ("y", "x"):
            assert torch.equal(result[of], actual[of][rows]), of
        for of in ("lora_a", "lora_b"):  # another order of the groups' sum
            torch.testing.assert_close(result[of], actual[of], rtol=1e-5, atol=1e-5)

    def test_two_runs_and_a_replay_are_bit_equal(self):
        case = named("shared_rank_rows")
        arguments, dy, first = self.run(case)

        def replayed(**arguments):
            names = tuple(arguments)
            return checkpoint(
                lambda *values: self.call(**dict(zip(names, values, strict=True))),
                *arguments.values(),
                use_reentrant=False,
            )

        _, _, second = self.run(case)
        third = value_and_gradients(replayed, arguments, dy)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
            assert torch.equal(value, third[name]), name

    def test_rows_that_nobody_selects_have_zero_gradients(self):
        arguments, _, gradients = self.run(Case("few", (20, 9, 0), (3, 2, 4), 32, 48, pool=20))
        chosen = torch.zeros(20, dtype=torch.bool, device=self.device)
        chosen[arguments["index"][:5]] = True  # the last group has no tokens
        for name in ("lora_a", "lora_b"):
            assert gradients[name][~chosen].eq(0).all()
            assert gradients[name][chosen].ne(0).any(dim=1).all()

    def test_factors_of_another_dtype_keep_theirs_in_the_gradients(self):
        case = named("shared_rank_rows")
        low = {
            name: value.half() if name in ("x", "weight", "bias") else value
            for name, value in inputs(case, torch.float32, device=self.device).items()
        }
        dy = draw_dy(case, torch.float16, self.device)
        actual = value_and_gradients(self.call, low, dy)
        half = inputs(case, torch.float16, device=self.device)
        eager = value_and_gradients(reference, half, dy)
        full = inputs(case, torch.float64, device=self.device)
        wanted = value_and_gradients(reference, full, dy.double())
        assert actual["y"].dtype == actual["x"].dtype == torch.float16
        assert actual["lora_a"].dtype == actual["lora_b"].dtype == torch.float32
        for name, value in actual.items():
            check_error_budget(
                value.to(eager[name].dtype), eager[name], wanted[name], name=name, factor=3.0
            )

    @pytest.mark.parametrize("wanted", [("x",), ("lora_a", "lora_b"), ("lora_b",)], ids="+".join)
    def test_gradients_do_not_depend_on_which_others_are_wanted(self, wanted):
        arguments, dy, every = self.run(named("shared_rank_rows"))
        leaves = {name: arguments[name].clone().requires_grad_() for name in wanted}
        y = self.call(**{**arguments, **leaves})
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
        for name, gradient in zip(wanted, gradients, strict=True):
            assert torch.equal(gradient, every[name]), name

    @pytest.mark.parametrize("base", [True, False])
    def test_small_gradients_of_float32_factors_on_a_float16_input_survive(self, base):
        case = Case("small gradients", (20, 9), (3, 2), 32, 48, pool=20, bias=True, base=base)
        arguments = inputs(case, torch.float32, device=self.device)
        arguments["lora_b"] *= 1e-4
        low = {
            name: value.half() if name in ("x", "weight", "bias") and value is not None else value
            for name, value in arguments.items()
        }
        dy = draw_dy(case, torch.float32, self.device) * 1e-6
        actual = value_and_gradients(self.call, low, dy)
        wanted = value_and_gradients(reference, arguments, dy.half().float())
        assert actual["y"].dtype == actual["x"].dtype == torch.float16
        for name in ("lora_a", "lora_b"):
            relative = (actual[name] - wanted[name]).norm() / wanted[name].norm()
            assert relative < 1e-3, name
