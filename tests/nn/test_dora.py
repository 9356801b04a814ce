"""DoRALinear over dense, Conv1D and 4-bit bases: formula, merge, files."""

import copy
import math

import pytest
import torch
from torch import nn

from fastpeft import convert, load_adapter, save_adapter
from fastpeft.nn import DoRALinear, LoRALinear
from fastpeft.nn.frozen import weight_of
from fastpeft.reference.dora import dora_linear as reference
from tests.models import llama, tokens
from tests.nn.test_lora import KINDS, base


def adapted(kind: str, dtype=torch.float32, **options) -> DoRALinear:
    layer = DoRALinear(base(kind, dtype), **({"r": 6, "alpha": 9} | options))
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.1)
        layer.lora_magnitude_vector.weight.mul_(1 + 0.2 * torch.randn(48))
    return layer


def factors(layer: DoRALinear) -> tuple:
    return layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector.weight, layer.scaling


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_and_follows_the_formula(kind):
    x, frozen = torch.randn(2, 5, 64), base(kind)
    expected = frozen(x)
    assert torch.allclose(DoRALinear(frozen, r=6)(x), expected, atol=1e-5)
    layer = adapted(kind)
    plain = reference(x, weight_of(layer.base), *factors(layer), layer.base.bias)
    assert torch.allclose(layer(x), plain, atol=1e-5)
    layer(x).sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_output_type_is_that_of_the_base(kind):
    layer, x = adapted(kind, torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    assert layer(x).dtype == layer.base(x).dtype == torch.bfloat16


def test_dropout_only_while_training():
    layer, x = adapted("dense", dropout=0.5), torch.randn(4, 64)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merge_stays_finite_and_unmerge_gives_all_back(kind, dtype):
    """With magnitudes of zero and below, from which a division by the gain would not come back."""
    layer, x = adapted(kind, dtype).eval(), torch.randn(7, 64).to(dtype)
    layer.lora_magnitude_vector.weight.data[:3] = torch.tensor([0.0, -1.0, 0.0])
    before, state, weight = layer(x), copy.deepcopy(layer.state_dict()), layer.base.weight
    lost = layer.merge()
    after = layer(x)
    tolerance = 2 * lost * torch.linalg.vector_norm(layer.delta_weight()) / 48**0.5 if lost > 1e-4 else 1e-4
    assert torch.isfinite(after).all()
    assert (after - before).float().square().mean().sqrt() < tolerance + (0.02 if dtype == torch.bfloat16 else 0)
    assert torch.allclose(after[:, 0].float(), layer.base.bias[0].float().expand(7), atol=1e-6)
    layer.unmerge()
    assert torch.equal(layer(x), before) and layer.base.weight is weight
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_unload_returns_the_merged_base():
    layer, x = adapted("dense").eval(), torch.randn(7, 64)
    expected = layer(x)
    merged = layer.unload()
    assert type(merged) is nn.Linear and torch.allclose(merged(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_trains(kind):
    layer = adapted(kind)
    with torch.no_grad():
        if kind in ("dense", "conv1d"):
            (layer.base.weight if kind == "dense" else layer.base.weight.t())[5] = 0
        layer.lora_B.weight[5] = 0
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        layer(torch.randn(9, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@pytest.mark.parametrize("r", (1, 100))
def test_ranks_up_to_above_both_dimensions(r):
    layer, x = adapted("dense", r=r), torch.randn(3, 64)
    assert torch.allclose(layer(x), reference(x, layer.base.weight, *factors(layer), layer.base.bias), atol=1e-4)


def test_training_learns_and_leaves_the_base():
    model, ids = llama(), tokens()
    convert(model, lambda linear: DoRALinear(linear, r=4, alpha=8), ["q_proj", "v_proj", "down_proj"])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and math.isfinite(losses[-1])
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_files_go_both_ways_with_peft(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    from tests.models import fill_adapters

    base, ids = llama(), tokens()
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]))
    fill_adapters(stock)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    stock.eval().save_pretrained(tmp_path / "stock")
    expected = stock(input_ids=ids).logits
    ours = copy.deepcopy(base)
    assert len(load_adapter(ours, tmp_path / "stock")) == 4
    assert sum(isinstance(module, DoRALinear) for module in ours.modules()) == 4
    assert torch.allclose(ours.eval()(input_ids=ids).logits, expected, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-4)
    plain = copy.deepcopy(base)
    convert(plain, lambda linear: LoRALinear(linear, r=4), ["q_proj", "down_proj"])
    with pytest.raises(ValueError, match="LoRALinear"):
        load_adapter(plain, tmp_path / "ours")
