"""accelerate for peft's DoRA: the same outputs, loss and gradients, and finite where peft gives NaN."""

import copy
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft.integrations.bitsandbytes import close_cpu_trap
from fastpeft.integrations.peft import FusedLinear, FusedLinear4bit
from tests.integrations.test_accelerate import assert_same
from tests.models import fill_adapters, gpt2, llama, loss_and_gradients, loss_curve, quantize, tokens

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = ("llama", "gpt2", "llama4bit")


def build(kind: str, dtype=FP32, base=None, **options) -> nn.Module:
    """A stock peft model with DoRA as if trained: no factor and no gain is trivial."""
    if base is None:
        base = gpt2(dtype) if kind == "gpt2" else llama(dtype)
        base = quantize(base, dtype) if kind == "llama4bit" else base
    options = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "fan_in_fan_out": kind == "gpt2"} | options
    autocast = options.pop("autocast_adapter_dtype", True)
    model = get_peft_model(base, LoraConfig(use_dora=True, **options), autocast_adapter_dtype=autocast)
    fill_adapters(model)
    with torch.no_grad():
        for magnitude in magnitudes(model):
            magnitude.mul_(1 + 0.1 * torch.randn_like(magnitude))
    return model.train()


def magnitudes(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "magnitude" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ("all-linear", "some"))
def test_parity_with_peft_in_float32(kind, targets):
    some = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    model, ids = build(kind, target_modules=targets if targets == "all-linear" else some), tokens()
    stock = loss_and_gradients(model, ids)
    assert sum("magnitude" in name for name in stock) == len(magnitudes(model))
    report = fastpeft.accelerate(model, strict=True)
    assert report.fused == len(report) > 0
    assert_same(loss_and_gradients(model, ids), stock, 2e-5)
    fastpeft.restore(model)
    assert not any(isinstance(module, (FusedLinear, FusedLinear4bit)) for module in model.modules())
    assert_same(loss_and_gradients(model, ids), stock, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masters", (FP32, BF16))
def test_parity_with_peft_in_bfloat16(kind, masters):
    """Against the same weights in float64: the accelerated model may be at most twice as far off as peft in bf16."""
    ids, base = tokens(), (gpt2 if kind == "gpt2" else llama)(BF16)
    exact_base = copy.deepcopy(base).double()
    if kind == "llama4bit":
        base = quantize(base, BF16)
        for name, linear in base.model.named_modules():
            if hasattr(linear, "quant_state"):
                weight = fastpeft.NF4Weight.from_bnb(linear).dequantize(FP32)
                exact_base.model.get_submodule(name).weight.data.copy_(weight)
    model = build(kind, base=base, autocast_adapter_dtype=False)
    exact = build("gpt2" if kind == "gpt2" else "llama", base=exact_base, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(exact, peft.get_peft_model_state_dict(model))
    truth = loss_and_gradients(exact.double(), ids)
    plain = loss_and_gradients(model, ids)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(masters)
    assert fastpeft.accelerate(model).fused == len(magnitudes(model))
    fused = loss_and_gradients(model, ids)
    for name, value in truth.items():
        allowed = 2 * (plain[name].double() - value).norm() + 2e-3 * value.norm()
        assert (fused[name].double() - value).norm() <= allowed, name
        assert fused[name].dtype == (masters if "lora_" in name else plain[name].dtype)


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_autocast(kind):
    model, ids = build(kind), tokens()
    with torch.autocast("cpu", BF16):
        stock = loss_and_gradients(model, ids)
        fastpeft.accelerate(model)
        fused = loss_and_gradients(model, ids)
    assert_same(fused, stock, 0.03)
    assert fused["logits"].dtype == stock["logits"].dtype


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_peft_given_the_same_mask(kind, monkeypatch):
    """A mask that depends on nothing but the shape, in both: outputs and gradients are the same, or the form is not."""
    from torch.nn import functional

    from fastpeft.ops import dora_linear_backends
    from fastpeft.reference.dropout import keep_mask

    seed, p = torch.tensor(77), 0.3

    def masked(x, p=0.5, training=True, inplace=False):
        keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p).view(x.shape)
        return x * keep / (1 - p) if training else x

    model, ids = build(kind, lora_dropout=p), tokens()
    with monkeypatch.context() as patch:
        patch.setattr(functional, "dropout", masked)
        stock = loss_and_gradients(model, ids)
    fastpeft.accelerate(model, strict=True)
    monkeypatch.setattr(dora_linear_backends, "keep_mask", lambda _, *arguments: keep_mask(seed, *arguments))
    assert_same(loss_and_gradients(model, ids), stock, 5e-5)


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_the_loss_curve_of_peft(kind):
    """30 steps of training with fused AdamW, which leaves versions as they are."""
    base = quantize(llama(), FP32) if kind == "llama4bit" else llama()
    curve = partial(loss_curve, base, tokens(4, 24), use_dora=True)
    stock, fused = curve(lambda model: None), curve(fastpeft.accelerate)
    assert stock[-1] < stock[0] - 0.5  # it learns
    assert (fused - stock).abs().max() < 0.01


def test_a_row_of_zeros_is_finite_where_peft_gives_nan():
    model, ids = build("llama", target_modules=["down_proj"]), tokens()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
        layer.lora_B["default"].weight[3] = 0
        layer.lora_magnitude_vector["default"].weight[3] = 0
    stock = loss_and_gradients(model, ids)
    assert torch.isnan(stock["loss"])  # peft: 0 / 0
    fastpeft.accelerate(model)
    assert all(torch.isfinite(value).all() for value in loss_and_gradients(model, ids).values())
    model.add_adapter("other", LoraConfig(use_dora=True, r=4, target_modules=["down_proj"]))
    model.base_model.set_adapter(["default", "other"])  # two at once run peft's forward: finite there, too
    assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_merge_and_unmerge_stay_finite_for_a_magnitude_of_zero(kind):
    model, ids = build(kind), tokens()
    with torch.no_grad():
        for magnitude in magnitudes(model):
            magnitude[:2] = torch.tensor([0.0, -1.0])
    stock = copy.deepcopy(model).eval()
    stock.merge_adapter()
    try:
        stock.unmerge_adapter()
        assert not torch.isfinite(stock(input_ids=ids).logits).all()  # peft: divides by a gain of 0
    except RuntimeError:
        assert kind == "gpt2"  # peft 0.20: forgets that a Conv1D holds its weight transposed
    fastpeft.accelerate(model.eval())
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_adapter_management(kind):
    """Switch, disable, merge, two at once: always what stock peft computes."""
    model, ids = build(kind, target_modules=["q_proj", "down_proj"]), tokens()
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    fill_adapters(model)
    stock = copy.deepcopy(model).eval()
    close_cpu_trap(stock)
    fastpeft.accelerate(model.eval())

    def same(tolerance=1e-4):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=tolerance)

    for name in ("default", "plain", "default"):
        for each in (model, stock):
            each.set_adapter(name)
        same()
    with model.disable_adapter(), stock.disable_adapter():
        same()
    for each in (model, stock):
        each.base_model.set_adapter(["default", "plain"])
    same()
    for each in (model, stock):
        each.set_adapter("default")
        each.merge_adapter()
    same(5e-2 if kind == "llama4bit" else 1e-4)
    for each in (model, stock):
        each.unmerge_adapter()
    same(5e-2 if kind == "llama4bit" else 1e-4)


def test_state_dict_and_files_are_untouched(tmp_path):
    model, ids = build("llama"), tokens()
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    fastpeft.accelerate(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())
    model.eval().save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert not any(isinstance(module, FusedLinear) for module in reloaded.modules())
    assert torch.allclose(reloaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_embedding_dora_is_left_to_peft_and_reported():
    model, ids = build("llama", target_modules=["embed_tokens", "q_proj"]), tokens()
    for embedding in model.base_model.model.model.embed_tokens.lora_embedding_A.values():
        nn.init.normal_(embedding, std=0.05)
    stock = loss_and_gradients(model, ids)
    report = fastpeft.accelerate(model)
    assert report.fused == 2 and len(report) == 3 and "embed_tokens" in str(report)
    assert_same(loss_and_gradients(model, ids), stock, 1e-5)


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_generate_equals_stock(kind):
    model, ids = build(kind), tokens(2, 5)
    model.eval()
    close_cpu_trap(model)
    options = dict(input_ids=ids, max_new_tokens=8, do_sample=False)
    stock = model.generate(**options)
    fastpeft.accelerate(model)
    assert torch.equal(model.generate(**options), stock)


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(reentrant):
    model, ids = build("llama"), tokens()
    fastpeft.accelerate(model)
    plain = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, ids), plain, 1e-6)


def test_weights_loaded_into_an_accelerated_model_are_seen():
    model, other, ids = build("llama"), build("llama"), tokens()
    fastpeft.accelerate(model.eval())
    model(input_ids=ids)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))
    fused = model(input_ids=ids).logits
    fastpeft.restore(model)
    assert torch.allclose(fused, model(input_ids=ids).logits, atol=1e-4)
