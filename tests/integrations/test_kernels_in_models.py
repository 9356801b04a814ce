"""An accelerated 4-bit model on the kernels: it trains and generates as on PyTorch's operations."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import fastpeft
from fastpeft import use_backend
from tests.backends import over
from tests.models import VOCAB, llama, loss_and_gradients, quantize, tokens, with_lora

BF16 = torch.bfloat16
both_methods = pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))


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


@both_methods
@over("triton", "cuda")
def test_training_has_the_gradients_of_eager(backend, dora):
    model, ids = (
        with_lora(quantize(llama(BF16), BF16), lora_dropout=0.0, use_dora=dora),
        tokens(3, 10).to(backend.device),
    )
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


@pytest.mark.slow
@both_methods
@over("triton", "cuda")
def test_dropout_has_the_mask_of_eager(backend, dora):
    model, ids = (
        with_lora(quantize(llama(BF16), BF16), lora_dropout=0.4, use_dora=dora),
        tokens(3, 10).to(backend.device),
    )
    model.to(backend.device)
    fastpeft.accelerate(model, strict=True)
    results = []
    for name in ("eager", backend.name):
        torch.manual_seed(5)
        with use_backend(name):
            results.append(loss_and_gradients(model, ids))
    for name, value in results[0].items():  # another mask would differ by as much as the gradient is long
        assert (results[1][name].double() - value.double()).norm() <= 0.1 * value.double().norm(), name


@pytest.mark.slow
@both_methods
@over("triton", "cuda")
def test_decoding_gives_the_logits_of_eager(backend, dora):
    """With a cache, token by token, each given: among greedy choices rounding decides where logits are close."""
    model, ids = with_lora(quantize(llama(BF16), BF16), use_dora=dora), tokens(2, 10).to(backend.device)
    model.to(backend.device).eval()
    fastpeft.accelerate(model, strict=True)
    logits = []
    for name in ("eager", backend.name):
        with use_backend(name), torch.no_grad():
            cache, rows = None, []
            for part in ids.split([7, 1, 1, 1], dim=1):
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(output.logits.double())
        logits.append(torch.cat(rows, 1))
    eager, kernels = logits
    assert kernels.shape == (*ids.shape, VOCAB)
    assert (kernels - eager).norm() < 0.03 * eager.norm()
