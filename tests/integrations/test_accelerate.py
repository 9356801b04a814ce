"""accelerate: the same model, outputs, loss and gradients as stock peft, whatever is done to it."""

import copy
import gc
import os
import warnings
import weakref
from datetime import timedelta
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpeft
from fastpeft.integrations.peft import FusedLinear, FusedLinear4bit
from tests.models import (
    assert_same,
    fill_adapters,
    gpt2,
    llama,
    loss_and_gradients,
    loss_curve,
    quantize,
    tokens,
    with_lora,
)

BF16, FP32 = torch.bfloat16, torch.float32


def build(kind: str, dtype=FP32, **options):
    if kind == "llama":
        return with_lora(llama(dtype), **options)
    if kind == "gpt2":
        return with_lora(gpt2(dtype), fan_in_fan_out=True, **options)
    return with_lora(quantize(llama(dtype), dtype), **options)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))
@pytest.mark.parametrize("targets", ("all-linear", "some"))
def test_parity_with_peft_in_float32(kind, targets):
    some = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    model, ids = build(kind, target_modules=targets if targets == "all-linear" else some), tokens()
    stock = loss_and_gradients(model, ids)
    report = fastpeft.accelerate(model, strict=True)
    assert report.fused == len(report) > 0
    assert_same(loss_and_gradients(model, ids), stock, 1e-5)
    fastpeft.restore(model)
    assert not any(isinstance(module, (FusedLinear, FusedLinear4bit)) for module in model.modules())
    assert_same(loss_and_gradients(model, ids), stock, 1e-7)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))
@pytest.mark.parametrize("autocast_adapter", (True, False))
def test_parity_with_peft_in_bfloat16(kind, autocast_adapter):
    """Against the same weights in float64: the accelerated model may be at most twice as far off as peft in bf16."""
    ids = tokens()
    base = {"llama": llama, "gpt2": gpt2}.get(kind, llama)(BF16)
    exact_base = copy.deepcopy(base).double()
    if kind == "llama4bit":
        base = quantize(base, BF16)
        for name, linear in base.model.named_modules():
            if hasattr(linear, "quant_state"):
                weight = fastpeft.NF4Weight.from_bnb(linear).dequantize(FP32)
                exact_base.model.get_submodule(name).weight.data.copy_(weight)
    options = LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    # Adapters in bf16 are the arithmetic that the fused path does; float32 adapters make peft more exact than bf16.
    model = get_peft_model(base, options, autocast_adapter_dtype=False)
    fill_adapters(model)
    exact = get_peft_model(exact_base, options, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(exact, peft.get_peft_model_state_dict(model))
    exact, truth = exact.double().train(), None
    truth = loss_and_gradients(exact, ids)
    plain = loss_and_gradients(model.train(), ids)
    if autocast_adapter:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    assert fastpeft.accelerate(model).fused == len(list(fastpeft.accelerate(model)))
    fused = loss_and_gradients(model, ids)
    for name, value in truth.items():
        allowed = 2 * (plain[name].double() - value).norm() + 2e-3 * value.norm()
        assert (fused[name].double() - value).norm() <= allowed, name
        assert fused[name].dtype == (FP32 if autocast_adapter and "lora_" in name else plain[name].dtype)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))
def test_folded_updates(kind):
    model, ids = build(kind), tokens()
    stock = loss_and_gradients(model, ids)
    fastpeft.accelerate(model, fold=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        folded = loss_and_gradients(model, ids)
    assert (24, 8) not in saved  # x A^T of 24 tokens at rank 8
    assert_same(folded, stock, 1e-5)
    fastpeft.restore(model)
    assert_same(loss_and_gradients(model, ids), stock, 1e-7)


@pytest.mark.slow
def test_folded_updates_have_the_loss_curve_of_peft():
    """30 steps in bf16 over a 4-bit base: the folded update follows stock peft as closely as the added one does."""
    curve = partial(loss_curve, quantize(llama(BF16), BF16), tokens(4, 24))
    stock, added = curve(lambda model: None), curve(fastpeft.accelerate)
    folded = curve(lambda model: fastpeft.accelerate(model, fold=True))
    assert stock[-1] < stock[0] - 0.5  # it learns
    distance = (added - stock).abs().max()
    assert (folded - stock).abs().max() < 2 * distance + 0.02


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_autocast(kind):
    model, ids = build(kind), tokens()
    with torch.autocast("cpu", BF16):
        stock = loss_and_gradients(model, ids)
        fastpeft.accelerate(model)
        fused = loss_and_gradients(model, ids)
    assert_same(fused, stock, 0.03)
    assert fused["logits"].dtype == stock["logits"].dtype


@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(kind, reentrant):
    model, ids = build(kind, lora_dropout=0.25), tokens()
    fastpeft.accelerate(model)
    torch.manual_seed(5)
    without = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(loss_and_gradients(model, ids), without, 1e-6)


def test_dropout_has_the_mean_of_peft():
    """The masks differ from torch's; the expectation and the variance of the output do not."""
    model = build("llama", lora_dropout=0.4, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 6, 128)
    with torch.no_grad():
        expected = model.eval() and layer(x)
        model.train()
        stock = torch.stack([layer(x) for _ in range(1500)])
        fastpeft.accelerate(model)
        fused = torch.stack([layer(x) for _ in range(1500)])
    error = stock.std(0) / 1500**0.5
    assert ((fused.mean(0) - expected).abs() / error).mean() < 1.0  # 0.8 for a normal distribution
    assert abs((fused.var(0) / stock.var(0)).mean() - 1) < 0.05
    model.eval()
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))
def test_adapter_management(kind):
    """Two adapters, switching, disabling, merging, mixed batches: every state gives what stock peft gives."""
    stock, ids = build(kind), tokens()
    # all-linear does not see through the first adapter, so name the targets.
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    second = LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_rslora=True, fan_in_fan_out=kind == "gpt2")
    stock.add_adapter("second", second)
    fill_adapters(stock)
    fused = copy.deepcopy(stock)
    fastpeft.accelerate(fused)

    def both(action, tolerance=1e-5):
        outputs = []
        for model in (stock, fused):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action(model)
            model.eval()
            with torch.no_grad():
                outputs.append({"logits": model(ids).logits})
            model.train()
        assert_same(*reversed(outputs), tolerance)
        return outputs[1]["logits"]

    fastpeft.integrations.bitsandbytes.close_cpu_trap(stock)
    first = both(lambda model: None)
    assert not torch.allclose(both(lambda model: model.set_adapter("second")), first, atol=1e-3)
    both(lambda model: model.base_model.set_adapter(["default", "second"]))
    with stock.disable_adapter(), fused.disable_adapter():
        both(lambda model: None)
    both(lambda model: model.set_adapter("default"))
    both(lambda model: model.base_model.merge_adapter(), 1e-4)
    both(lambda model: model.base_model.unmerge_adapter(), 1e-4)
    both(lambda model: model.base_model.scale_layer(0.5) if hasattr(model.base_model, "scale_layer") else None, 1e-4)
    both(lambda model: model.delete_adapter("default") or model.set_adapter("second"), 1e-4)
    if kind != "llama4bit":
        merged = [model.merge_and_unload().eval()(ids).logits for model in (stock, fused)]
        assert torch.allclose(*merged, atol=1e-5)


def test_mixed_batch_runs_peft():
    model, ids = build("llama"), tokens(3)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    fill_adapters(model)
    model.eval()
    names = ["default", "second", "__base__"]
    stock = model(ids, adapter_names=names).logits
    fastpeft.accelerate(model)
    assert torch.equal(model(ids, adapter_names=names).logits, stock)


def test_state_dict_parameters_and_files_are_untouched(tmp_path):
    model = build("llama4bit")
    before = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    fastpeft.accelerate(model)
    assert before == {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(model)
    loaded = peft.load_peft_weights(str(tmp_path), device="cpu")
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)


def test_deepcopy_is_independent_and_accelerated():
    for kind in ("llama", "llama4bit"):
        model, ids = build(kind), tokens()
        fastpeft.accelerate(model)
        expected = loss_and_gradients(model, ids)
        clone = copy.deepcopy(model)
        fill_adapters(model)
        assert_same(loss_and_gradients(clone, ids), expected, 1e-6)
        fastpeft.restore(clone)
        assert_same(loss_and_gradients(clone, ids), expected, 1e-4)


def test_hooks_on_the_layers_inside_are_not_bypassed():
    model, ids = build("llama"), tokens()
    fastpeft.accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for inner in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]):
        calls = []
        handle = inner.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        model(ids)
        handle.remove()
        assert calls == [1]


def test_four_bit_training_after_evaluation_has_the_same_gradients():
    """bitsandbytes repacks a 4-bit weight at a no-grad eval() forward on a CPU with AVX512-BF16."""
    model, ids = build("llama4bit", BF16), tokens()
    fastpeft.accelerate(model)
    before = loss_and_gradients(model, ids)
    model.eval()
    with torch.no_grad():
        model(ids)
        with model.disable_adapter():  # runs bitsandbytes' own forward
            model(ids)
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    after = loss_and_gradients(model.train(), ids)
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_repacked_storage_is_refused_and_nothing_is_changed():
    model = build("llama4bit")
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.*repacked.*reload"):
        fastpeft.accelerate(model)
    assert not any(isinstance(module, FusedLinear4bit) for module in model.modules())


def test_four_bit_base_under_a_dense_lora_layer():
    """Without `is_loaded_in_4bit` peft wraps a Linear4bit in its dense class."""
    base = quantize(llama(), FP32)
    base.is_loaded_in_4bit = False
    model, ids = with_lora(base), tokens()
    stock = loss_and_gradients(model, ids)
    assert fastpeft.accelerate(model).fused > 0
    assert_same(loss_and_gradients(model, ids), stock, 1e-5)


def test_float16_compute_under_wider_activations_keeps_small_gradients():
    """As after prepare_model_for_kbit_training: gradients of 1e-8 would vanish in float16."""
    model = with_lora(quantize(llama(), torch.float16))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x, dy = torch.randn(20, 128, requires_grad=True), 1e-8 * torch.randn(20, 128)
    gradients = []
    for prepare in (lambda model: None, fastpeft.accelerate):
        prepare(model)
        layer(x).backward(dy)
        gradients.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad})
        model.zero_grad(set_to_none=True)
        x.grad = None
    assert_same(*reversed(gradients), 1e-3)
    assert gradients[1]["lora_A.default.weight"].abs().max() > 0


def test_accelerated_layers_are_freed_and_follow_their_storage():
    model, ids = build("llama4bit"), tokens()
    fastpeft.accelerate(model)
    model(ids)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x, base = torch.randn(3, 128), layer.base_layer
    before = layer(x)
    base.weight.data = base.weight.data.flip(0)
    assert not torch.allclose(layer(x), before)
    remains = weakref.ref(base)
    del model, layer, base
    gc.collect()
    assert remains() is None


def test_restore_does_not_open_a_trap_that_accelerate_did_not_close():
    model = build("llama4bit")
    bases = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for base in bases:
        base.support_avx512bf16_for_cpu = True  # as on a CPU with AVX512-BF16
    bases[0].support_avx512bf16_for_cpu = False  # by the user
    fastpeft.accelerate(model)
    assert not any(base.support_avx512bf16_for_cpu for base in bases)
    fastpeft.restore(model)
    assert [base.support_avx512bf16_for_cpu for base in bases] == [False] + [True] * (len(bases) - 1)


def test_layers_of_somebody_else_and_full_dropout_run_peft():
    class OwnLinear(peft.tuners.lora.Linear):
        pass

    model, x = build("llama", lora_dropout=0.5), torch.randn(3, 128)
    layers = model.base_model.model.model.layers
    layers[0].self_attn.q_proj.__class__ = OwnLinear
    report = fastpeft.accelerate(model)
    assert report.fused == len(report) - 1 and any("OwnLinear is not supported" in row.reason for row in report)
    layer = layers[1].self_attn.q_proj
    layer.lora_dropout["default"].p = 1.0
    assert torch.equal(layer(x), layer.base_layer(x))


def test_report_names_every_module_and_reason():
    model = with_lora(llama(), target_modules=["q_proj", "embed_tokens"])
    report = fastpeft.accelerate(model)
    rows = {row.name.split("base_model.model.")[-1]: row for row in report}
    assert rows["model.layers.0.self_attn.q_proj"].status == "fused"
    assert rows["model.embed_tokens"].status == "peft" and "Embedding" in rows["model.embed_tokens"].reason
    assert report.fused == 2 and len(report) == 3
    assert "2 of 3 adapter modules are fused" in str(report) and "model.embed_tokens" in str(report)

    assert fastpeft.accelerate(model).fused == 2  # again: the same

    bias = fastpeft.accelerate(with_lora(llama(), lora_bias=True))
    assert bias.fused == 0 and all("lora_bias" in row.reason for row in bias)


def test_strict_raises_when_nothing_can_be_fused():
    with pytest.raises(ValueError, match="no adapter module of this model can be fused"):
        fastpeft.accelerate(llama(), strict=True)
    with pytest.raises(ValueError, match="lora_bias"):
        fastpeft.accelerate(with_lora(llama(), lora_bias=True), strict=True)


def test_variants_run_peft():
    ids = tokens()
    model = with_lora(llama(), alora_invocation_tokens=[int(ids[0, 3])], task_type="CAUSAL_LM")
    stock = loss_and_gradients(model, ids)
    report = fastpeft.accelerate(model)
    assert report.fused == 0 and all("ALora" in row.reason for row in report)
    assert_same(loss_and_gradients(model, ids), stock, 1e-6)


def test_trainable_bias_and_hotswap_scaling():
    model, ids = build("llama", bias="all"), tokens()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = torch.tensor(1.5)
    stock = loss_and_gradients(model, ids)
    assert any("q_proj.base_layer.bias" in name for name in stock)
    fastpeft.accelerate(model)
    assert_same(loss_and_gradients(model, ids), stock, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("llama", "llama4bit"))
def test_compile_fullgraph(kind):
    model, ids = build(kind), tokens()
    fastpeft.accelerate(model)
    eager = loss_and_gradients(model, ids)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, 192)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert_same(loss_and_gradients(model, ids), eager, 1e-5)


def test_generate_equals_stock():
    model, ids = build("llama4bit"), tokens()
    fastpeft.integrations.bitsandbytes.close_cpu_trap(model)
    model.eval()
    stock = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    fastpeft.accelerate(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), stock)


def _ddp_worker(rank: int, directory: str) -> None:
    import torch.distributed as dist

    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, ids = build("llama4bit"), tokens(4)
    fastpeft.accelerate(model)
    expected = loss_and_gradients(model, ids)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    got = loss_and_gradients(wrapped, ids[2 * rank : 2 * rank + 2])
    for name, parameter in expected.items():
        if "lora_" in name:
            assert torch.allclose(got[f"module.{name}"], parameter, rtol=1e-4, atol=1e-7), name
    dist.barrier()
    Path(directory, f"passed{rank}").touch()
    # Not by return: the reducer's destructor holds the GIL and joins a gloo thread that may wait for it (torch 2.13).
    os._exit(0)


@pytest.mark.slow
def test_ddp(tmp_path):
    """Two processes on halves of a batch: the averaged gradients are those of the whole batch."""
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    assert all((tmp_path / f"passed{rank}").exists() for rank in range(2))
