"""Low-rank pairs, and what is added to a base weight and taken off again."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import fslora_kernels
from fslora.assignment import first_state
from fslora.lowrank import as_matrix, norm, product, stack, tail_norm
from fslora.protocol import LoRAWeights
from fslora.residual import applied, grown

from .worlds import dense, pair, peft_model


def test_stacks_norms_and_tails_equal_the_dense_ones():
    one, two = pair(3, 5, 7, 1), pair(2, 5, 7, 2)
    torch.testing.assert_close(
        dense(stack([one, two], [0.25, -3.0])), 0.25 * dense(one) - 3 * dense(two)
    )
    assert norm(one) == pytest.approx(float(dense(one).norm()), rel=1e-12)
    wanted = (
        one.lora_b[1:].norm() * one.lora_a[1:].norm()
        + two.lora_b[1:].norm() * two.lora_a[1:].norm()
    )
    torch.testing.assert_close(tail_norm({"x": one, "y": two}, 1), wanted)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (7, 5), (6, 6)])
def test_a_product_that_has_become_a_matrix_is_summed_and_used_as_one(inputs, outputs):
    pairs = [pair(rank, inputs, outputs, rank) for rank in (3, 9)]
    whole = as_matrix(pairs)
    assert whole.rank == min(inputs, outputs)
    wanted = dense(pairs[0]) + dense(pairs[1])
    torch.testing.assert_close(dense(whole), wanted)
    assert torch.equal(product(whole), dense(whole))
    torch.testing.assert_close(product(pairs[1]), dense(pairs[1]))
    torch.testing.assert_close(product(as_matrix([whole, pairs[0]])), wanted + dense(pairs[0]))
    square = pair(inputs, inputs, outputs, 5)
    torch.testing.assert_close(product(square), dense(square))


def test_a_sum_that_cancels_keeps_its_small_part():
    large, small = pair(2, 5, 7, 1), pair(2, 5, 7, 2)
    parts = [
        LoRAWeights(a.float(), (b * size).float()) for size, (a, b) in ((1e6, large), (1, small))
    ]
    back = parts[0]._replace(lora_b=-parts[0].lora_b)
    torch.testing.assert_close(product(as_matrix([*parts, back])), dense(parts[1]))


def test_a_residual_grows_exactly_and_never_beyond_a_matrix():
    state, wanted, ranks = first_state({}, {}, seed=0), torch.zeros(7, 5), []
    for number in range(6):
        addition = LoRAWeights(*(factor.float() for factor in pair(2, 5, 7, number)))
        state, wanted = grown(state, [], {"x": addition}), wanted + dense(addition)
        ranks.append(state.base_residual["x"].rank)
        torch.testing.assert_close(product(state.base_residual["x"]), wanted)
        assert state.base_residual["x"].lora_a.dtype == torch.float32
    assert ranks == [2, 4, 5, 5, 5, 5]


def test_a_residual_on_transposed_weights_adds_what_it_says():
    """GPT-2's Conv1D keeps [in, out], here also in a square layer, which no shape gives away."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32, n_positions=16)
        base = GPT2LMHeadModel(config).double()
        targets = ["c_attn", "c_proj"]
        lora = LoraConfig(r=2, lora_alpha=6, target_modules=targets, fan_in_fan_out=True)
        model = get_peft_model(base, lora)
    fslora_kernels.fuse(model)
    for name in fslora_kernels.modules(model):
        layer = model.get_submodule(name)
        residual = {name: pair(5, layer.in_features, layer.out_features)}
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(1)).double()
        before, bits = layer(x), layer.base_layer.weight.clone()
        with applied(model, residual):
            got = layer(x)
        torch.testing.assert_close(got, before + 3 * x @ dense(residual[name]).t())
        assert torch.equal(layer.base_layer.weight, bits)


def test_a_base_that_nothing_can_be_added_to_is_refused(tiny_llama):
    model = peft_model(tiny_llama)
    name = fslora_kernels.fuse(model).fused.popitem()[0]
    layer = model.get_submodule(name)
    layer.base_layer.weight = torch.nn.Parameter(
        torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False
    )
    residual = {name: pair(2, layer.in_features, layer.out_features)}
    with pytest.raises(ValueError, match="load the model unquantised"), applied(model, residual):
        pass


def test_an_error_inside_leaves_the_base_as_it_was(tiny_llama):
    model = peft_model(tiny_llama)
    names = list(fslora_kernels.fuse(model).fused)
    before = {n: p.clone() for n, p in model.named_parameters()}
    residual = {}
    for name in names:
        layer = model.get_submodule(name)
        residual[name] = pair(3, layer.in_features, layer.out_features)
    with pytest.raises(KeyboardInterrupt), applied(model, residual):
        raise KeyboardInterrupt
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
