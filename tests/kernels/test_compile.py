"""The fused layer inside ``torch.compile``: no graph break, and no compile for a new index set."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

import fslora_kernels
from fslora_kernels._dispatch import interpreting
from fslora_kernels.sampling import draw_indices

# Dynamo looks at warnings that torch and PEFT raise about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
IDS = torch.arange(32).reshape(2, 16)


def llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 288, "vocab_size": 40}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    lora = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **config}
    model = get_peft_model(base, LoraConfig(**lora))
    fslora_kernels.fuse(model)
    return model


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def loss_and_gradients(run, parameters):
    loss = run(input_ids=IDS, labels=IDS).loss
    return loss.detach(), torch.autograd.grad(loss, parameters)


def test_view_mode_compiles_once_for_each_size(counter):
    model = llama()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for key, (ratio, compiles) in enumerate([(0.5, 1), (0.5, 1), (0.25, 2), (0.25, 2), (0.5, 2)]):
        fslora_kernels.sketch(model, draw_indices(key, fslora_kernels.ranks(model), ratio))
        got = loss_and_gradients(compiled, trained)
        want = loss_and_gradients(model, trained)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == compiles


def test_a_new_round_of_compact_leaves_compiles_nothing(counter):
    model = llama()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for key in range(3):
        leaves = fslora_kernels.extract(
            model, draw_indices(key, fslora_kernels.ranks(model), ratio=0.5)
        )
        fslora_kernels.bind(model, leaves)
        trained = [factor for pair in leaves.values() for factor in pair]
        got = loss_and_gradients(compiled, trained)
        want = loss_and_gradients(model, trained)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_dropout_is_drawn_anew_in_each_step(counter):
    model = llama(lora_dropout=0.5).train()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = {compiled(input_ids=IDS, labels=IDS).loss.item() for _ in range(3)}
    whole = model.eval()(input_ids=IDS, labels=IDS).loss.item()
    assert len(losses) == 3
    assert whole not in losses
    assert counter.frame_count == 1


def test_a_hot_swapped_scaling_compiles_nothing(counter):
    """PEFT keeps ``scaling`` as a tensor where adapters are swapped under a compiled model."""
    model = llama()
    layers = [model.get_submodule(name) for name in fslora_kernels.modules(model)]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scaling in (0.5, 2.0):
        for layer in layers:
            layer.scaling["default"] = torch.tensor(scaling)
        got = compiled(input_ids=IDS).logits
        torch.testing.assert_close(got, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        fslora_kernels.unfuse(model)
        torch.testing.assert_close(got, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        fslora_kernels.fuse(model)
    assert counter.frame_count == 1


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.5}],
    ids=["plain", "rslora", "dropout"],
)
def test_triton_is_an_operator_of_the_graph(counter, config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    lora = LoraConfig(r=8, target_modules=["0", "1"], init_lora_weights=False, **config)
    model = get_peft_model(model, lora)
    fslora_kernels.fuse(model, "triton")
    fslora_kernels.sketch(model, draw_indices(0, fslora_kernels.ranks(model), 0.5))
    x = torch.randn(5, 32, requires_grad=True)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run(model):
        torch.manual_seed(3)
        return torch.autograd.grad(model(x).square().sum(), trained)

    got = run(torch.compile(model, backend=counter, fullgraph=True))
    operators = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("fslora_kernels.sketched_linear" in name for name in operators) == 2
    if "lora_dropout" not in config:
        torch.testing.assert_close(got, run(model))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in got)


@pytest.mark.interpreter
@needs_interpreter
def test_the_operator_is_what_torch_expects_of_one():
    from fslora_kernels.ops.sketched_linear import traced

    factors = [torch.randn(4, 32, requires_grad=True), torch.randn(4, 16, requires_grad=True)]
    x, weight = torch.randn(3, 32, requires_grad=True), torch.randn(16, 32)
    index, bias = torch.tensor([0, 2]), torch.randn(16)
    for dropout in (0.0, 0.5):
        arguments = (x, weight, *factors, index, bias, None, 2.0, dropout, torch.tensor(7))
        torch.library.opcheck(traced._forward, arguments)
        strided = (torch.randn(32, 3).t().requires_grad_(), *arguments[1:])
        torch.library.opcheck(traced._forward, strided)
        with torch.no_grad():
            _, h, mask = traced._forward(*strided)
            saved = (strided[0], weight, *factors, index, None, h, mask, 2.0, dropout)
            torch.library.opcheck(traced._backward, (torch.randn(3, 16), *saved, [True] * 3))
