"""An accelerated 4-bit model on the kernels: it trains and generates as on PyTorch's operations."""

import copy

import torch
from transformers import LlamaForCausalLM

import fastpeft
from fastpeft import use_backend
from tests.backends import over
from tests.models import llama, loss_and_gradients, quantize, tokens, with_lora

BF16 = torch.bfloat16


def in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model, its 4-bit linears dense, in float64: what rounding is measured against."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if hasattr(module, "quant_state"):
            weight = fastpeft.NF4Weight.from_bnb(module).dequantize(torch.float32)
            dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            dense.weight.data, dense.bias = weight, module.bias
            exact.set_submodule(name, dense.requires_grad_(False))
    return exact.double()


@over("triton", "cuda")
def test_training_has_the_gradients_of_eager(backend):
    model, ids = with_lora(quantize(llama(BF16), BF16), lora_dropout=0.0), tokens(3, 10).to(backend.device)
    exact = loss_and_gradients(in_float64(model).train(), ids.cpu())
    model.to(backend.device)
    fastpeft.accelerate(model, strict=True)
    with use_backend("eager"):
        eager = loss_and_gradients(model, ids)
    with use_backend(backend.name):
        kernels = loss_and_gradients(model, ids)
    assert kernels.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        allowed = 2 * (eager[name].cpu().double() - value).norm() + 1e-3 * value.norm()
        assert (kernels[name].cpu().double() - value).norm() <= allowed, name


@over("triton", "cuda")
def test_dropout_has_the_mask_of_eager(backend):
    model, ids = with_lora(quantize(llama(BF16), BF16), lora_dropout=0.4), tokens(3, 10).to(backend.device)
    model.to(backend.device)
    fastpeft.accelerate(model, strict=True)
    results = []
    for name in ("eager", backend.name):
        torch.manual_seed(5)
        with use_backend(name):
            results.append(loss_and_gradients(model, ids))
    for name, value in results[0].items():  # another mask would differ by as much as the gradient is long
        assert (results[1][name].double() - value.double()).norm() <= 0.1 * value.double().norm(), name


@over("triton", "cuda")
def test_generation_gives_the_tokens_of_eager(backend):
    model, ids = with_lora(quantize(llama(BF16), BF16)), tokens(2, 7).to(backend.device)
    model.to(backend.device).eval()
    fastpeft.accelerate(model, strict=True)
    generated = []
    for name in ("eager", backend.name):
        with use_backend(name):
            generated.append(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
    assert torch.equal(*generated) and generated[0].shape == (2, 10)
