"""accelerate on (IA)^3: the outputs, loss and gradients of stock peft, whatever is done to the model."""

import copy
import warnings

import peft
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

import fastpeft
from fastpeft.integrations.ia3 import FusedIA3Linear, FusedIA3Linear4bit
from tests.models import assert_same, gpt2, llama, loss_and_gradients, quantize, tokens

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))


def config(kind: str) -> IA3Config:
    if kind == "gpt2":
        return IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                         fan_in_fan_out=True)  # fmt: skip
    return IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])


def fill(model: nn.Module) -> None:
    """A trained adapter, with zeros in it."""
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
            parameter.data.view(-1)[::7] = 0


def build(kind: str, dtype=FP32, **options) -> nn.Module:
    base = gpt2(dtype) if kind == "gpt2" else llama(dtype)
    model = get_peft_model(quantize(base, dtype) if kind == "llama4bit" else base, config(kind), **options)
    fill(model)
    return model.train()


@KINDS
def test_parity_with_peft_in_float32(kind):
    model, ids = build(kind), tokens()
    stock = loss_and_gradients(model, ids)
    report = fastpeft.accelerate(model, strict=True)
    assert report.fused == len(report) == (4 if kind == "gpt2" else 6)
    assert_same(loss_and_gradients(model, ids), stock, 1e-5)
    fastpeft.restore(model)
    assert not any(isinstance(module, FusedIA3Linear | FusedIA3Linear4bit) for module in model.modules())
    assert_same(loss_and_gradients(model, ids), stock, 1e-7)


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
@pytest.mark.parametrize("wide", (True, False))
def test_parity_with_peft_in_bfloat16(kind, wide):
    """Against the same weights in float64: at most twice as far off as peft."""
    model, ids = build(kind, BF16, autocast_adapter_dtype=wide), tokens()
    truth = loss_and_gradients(copy.deepcopy(model).double(), ids)
    plain = loss_and_gradients(model, ids)
    fastpeft.accelerate(model, strict=True)
    fused = loss_and_gradients(model, ids)
    for name, value in truth.items():
        allowed = 2 * (plain[name].double() - value).norm() + 2e-3 * value.norm()
        assert (fused[name].double() - value).norm() <= allowed, name
        assert fused[name].dtype == plain[name].dtype, name


@KINDS
def test_autocast(kind):
    model, ids = build(kind), tokens()
    with torch.autocast("cpu", BF16):
        stock = loss_and_gradients(model, ids)
        fastpeft.accelerate(model)
        assert_same(loss_and_gradients(model, ids), stock, 0.03)


def test_a_4_bit_layer_returns_the_type_of_its_base():
    """Stock peft returns float32 from it where the activations are bfloat16."""
    model = build("llama4bit", BF16)
    layer, x = model.base_model.model.model.layers[0].self_attn.k_proj, torch.randn(2, 3, 128).to(BF16)
    stock = layer(x)
    fastpeft.accelerate(model)
    fused = layer(x)
    assert (stock.dtype, fused.dtype) == (FP32, BF16)
    assert (fused.double() - stock.double()).norm() < 0.01 * stock.double().norm()
    loss_and_gradients(model, tokens())


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(kind, reentrant):
    model, ids = build(kind), tokens()
    fastpeft.accelerate(model)
    without = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(loss_and_gradients(model, ids), without, 1e-6)


@KINDS
def test_adapter_management(kind):
    """Two adapters, both at once, disabled, deleted, copied: every state gives what stock peft gives."""
    stock, ids = build(kind), tokens()
    stock.add_adapter("second", config(kind))
    fill(stock)
    fused = copy.deepcopy(stock)
    fastpeft.accelerate(fused)
    fused = copy.deepcopy(fused)
    fastpeft.integrations.bitsandbytes.close_cpu_trap(stock)

    def both(action, tolerance=1e-5):
        outputs = []
        for model in (stock, fused):
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                action(model)
                outputs.append({"logits": model.eval()(ids).logits})
        assert_same(*reversed(outputs), tolerance)
        return outputs[1]["logits"]

    first = both(lambda model: None)
    assert not torch.allclose(both(lambda model: model.set_adapter("second")), first, atol=1e-3)
    both(lambda model: model.base_model.set_adapter(["default", "second"]))
    with stock.disable_adapter(), fused.disable_adapter():
        both(lambda model: None)
    both(lambda model: model.set_adapter("default"))
    both(lambda model: model.base_model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "mixed"))
    both(lambda model: model.set_adapter("mixed"))
    if kind != "llama4bit":
        both(lambda model: model.base_model.merge_adapter(), 1e-4)
        both(lambda model: model.delete_adapter("second"), 1e-4)
        merged = [model.merge_and_unload().eval()(ids).logits for model in (stock, fused)]
        assert torch.allclose(*merged, atol=1e-4)


def test_merge_into_4_bits():
    model, ids = build("llama4bit").eval(), tokens()
    fastpeft.accelerate(model)
    with torch.no_grad():
        before = model(ids).logits
        base = model.base_model.model.model.layers[0].mlp.down_proj.base_layer
        packed = base.weight.data.clone()
        model.base_model.merge_adapter()
        merged = model(ids).logits
        with pytest.warns(UserWarning, match="already merged"):
            model.base_model.merge_adapter()
        assert not torch.equal(base.weight.data, packed)
        assert (merged - before).norm() < 0.2 * before.norm()  # two roundings to 4 bits instead of one
        model.base_model.unmerge_adapter()
        assert torch.equal(base.weight.data, packed) and torch.equal(model(ids).logits, before)
        model.base_model.merge_adapter()
        with model.disable_adapter():
            without = model(ids).logits
        assert torch.equal(base.weight.data, packed)  # unmerged, as peft does it
        model.base_model.merge_adapter()
        fastpeft.restore(model)
        assert torch.equal(base.weight.data, packed)
        stock = model(ids).logits  # bitsandbytes may compute it in bfloat16
        assert (stock - before).norm() < 0.02 * before.norm() < (without - before).norm()


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_files_and_state_dict_are_those_of_peft(kind, tmp_path):
    model, ids = build(kind), tokens()
    base = copy.deepcopy(model)
    keys = list(model.state_dict())
    fastpeft.accelerate(model)
    assert keys == list(model.state_dict())
    model.save_pretrained(tmp_path)
    for name, parameter in base.named_parameters():
        if "ia3_l" in name:
            parameter.data.fill_(1)
    again = PeftModel.from_pretrained(base.unload() if kind == "llama" else _plain(base), tmp_path)
    fastpeft.accelerate(again, strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    state, loaded = peft.get_peft_model_state_dict(model), peft.load_peft_weights(str(tmp_path), device="cpu")
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)


def _plain(model: nn.Module) -> nn.Module:
    """The 4-bit base of a peft model: peft itself refuses to unload one."""
    base = model.base_model.model
    for name, module in list(base.named_modules()):
        if isinstance(module, peft.tuners.ia3.IA3Layer):
            base.set_submodule(name, module.base_layer)
    return base


def test_hooks_and_other_calls_run_peft():
    model, ids = build("llama"), tokens()
    fastpeft.accelerate(model)
    layer, calls = model.base_model.model.model.layers[0].self_attn.k_proj, []
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(ids)
    handle.remove()
    assert calls == [1]


def test_what_is_not_understood_is_left_and_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x)

    model = get_peft_model(Net(), IA3Config(target_modules=["conv"], feedforward_modules=[]))
    (row,) = fastpeft.accelerate(model)
    assert row.status == "peft" and "ia3.layer.Conv2d is not supported" in row.reason
    with pytest.raises(ValueError, match="no adapter module"):
        fastpeft.accelerate(model, strict=True)


@pytest.mark.slow
def test_compile_has_no_graph_break():
    model, ids = build("llama"), tokens()
    fastpeft.accelerate(model)
    eager = model(ids).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(ids).logits, eager, atol=1e-5)
