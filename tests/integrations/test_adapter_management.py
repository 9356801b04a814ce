"""What people do with several adapters, on a model that was accelerated before and on one that is accelerated after:
always what stock peft computes, outputs and gradients."""

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import fastpeft
from fastpeft.integrations.bitsandbytes import close_cpu_trap
from tests import models

TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


def fill(model, seed):
    """Random adapters, none of which does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_l")):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def stock_model(method, four_bits, seed=0):
    from peft import get_peft_model

    torch.manual_seed(0)  # one base
    base = models.llama()
    if four_bits:
        base = models.quantize(base, torch.float32)
        close_cpu_trap(base)
    model = get_peft_model(base, METHODS[method])
    fill(model, seed)
    return model


@pytest.fixture
def folder(tmp_path):
    """`folder(method, four_bits, seed)`: where another adapter of the same base lies, as peft saves it."""

    def save(method, four_bits, seed):
        path = tmp_path / f"{method}-{seed}"
        stock_model(method, four_bits, seed).save_pretrained(path)
        return path

    return save


def check(actions, method, four_bits, tolerance=1e-5):
    """After each of the actions, a model that was accelerated before them all, one that is accelerated after it, and
    one that is accelerated and restored give the loss and the gradients of stock peft."""
    ids = models.tokens()
    stock = stock_model(method, four_bits)
    before = copy.deepcopy(stock)
    fastpeft.accelerate(before, strict=True)
    close_cpu_trap(stock)
    for action in actions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of rounding and of several adapters
            for model in (stock, before):
                action(model)
        after = copy.deepcopy(stock)
        fastpeft.accelerate(after)
        restored = copy.deepcopy(before)
        fastpeft.restore(restored)
        close_cpu_trap(restored)  # else bitsandbytes computes with a repacked, rounded weight
        expected = results(stock, ids)
        for name, model in {"before": before, "after": after, "restored": restored}.items():
            actual = results(model, ids)
            assert actual.keys() == expected.keys()
            for key, value in actual.items():
                error = f"{method}, accelerated {name}: {key}"
                assert torch.allclose(value, expected[key], rtol=tolerance, atol=tolerance), error
        fastpeft.accelerate(before)


def results(model, ids):
    if model(input_ids=ids).logits.requires_grad:
        found = models.loss_and_gradients(model.train(), ids)
        return {key: value for key, value in found.items() if value is not None}  # an adapter that is not active
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=ids).logits}


@pytest.mark.parametrize("four_bits", (False, True), ids=("dense", "nf4"))
@pytest.mark.parametrize("method", METHODS)
def test_load_switch_disable_and_delete(method, four_bits, folder):
    second = folder(method, four_bits, 1)
    check(
        [
            lambda model: model.load_adapter(second, "second", is_trainable=True),
            lambda model: model.set_adapter("second"),
            lambda model: model.base_model.set_adapter(["default", "second"]),
            lambda model: model.base_model.disable_adapter_layers(),
            lambda model: model.base_model.enable_adapter_layers(),
            lambda model: model.set_adapter("second"),
            lambda model: model.delete_adapter("default"),
        ],
        method,
        four_bits,
    )


@pytest.mark.parametrize("kind", ("linear", "cat", "svd", "ties", "magnitude_prune"))
def test_weighted_combinations(kind, folder):
    second = folder("lora", False, 1)
    options = {"density": 0.5} if kind in ("ties", "magnitude_prune") else {}

    def combine(model):
        model.load_adapter(second, "second")
        weights = ["default", "second"], [0.3, 0.7], "mixed"
        model.add_weighted_adapter(*weights, combination_type=kind, **options)
        model.set_adapter("mixed")

    check([combine], "lora", False, 1e-4)


def test_a_weighted_combination_of_ia3(folder):
    second = folder("ia3", True, 1)

    def combine(model):
        model.load_adapter(second, "second")
        model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "mixed")
        model.set_adapter("mixed")

    check([combine], "ia3", True)


@pytest.mark.parametrize("four_bits", (False, True), ids=("dense", "nf4"))
def test_hot_swap(four_bits, folder):
    """Parameters are overwritten in place: nothing that was kept of the old ones may be used again. (Of DoRA peft 0.21
    cannot swap the magnitude.)"""
    paths = [folder("lora", four_bits, seed) for seed in (1, 2)]
    swaps = [lambda model, path=path: hotswap_adapter(model, str(path), "default") for path in paths]
    check(swaps, "lora", four_bits)


def test_hot_swap_of_another_rank_and_scaling(tmp_path):
    other = models.with_lora(stock_model("lora", False).unload(), r=2, lora_alpha=6, target_modules=TARGETS)
    other.save_pretrained(tmp_path)
    swaps = [
        lambda model: prepare_model_for_compiled_hotswap(model, target_rank=8),
        lambda model: hotswap_adapter(model, str(tmp_path), "default"),
    ]
    check(swaps, "lora", False)


@pytest.mark.parametrize("method", METHODS)
def test_merge_unmerge_and_unload(method):
    check([lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()], method, False, 1e-4)
    ids = models.tokens()
    for leave in ("unload", "merge_and_unload"):
        stock = stock_model(method, False)
        fused = copy.deepcopy(stock)
        fastpeft.accelerate(fused)
        plain = [getattr(model, leave)().eval() for model in (stock, fused)]
        assert not any(type(m).__module__.startswith("fastpeft") for m in plain[1].modules())
        logits = [model(input_ids=ids).logits for model in plain]
        assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_other_modules_is_accelerated_by_the_next_call(method):
    """peft wraps what it had not wrapped; `accelerate` again finds it, and the report says so."""
    model = stock_model(method, False)
    names = {row.name for row in fastpeft.accelerate(model)}
    wider = copy.deepcopy(METHODS[method])
    wider.target_modules = {*TARGETS, "k_proj"}
    model.add_adapter("wider", wider)
    fill(model, 3)
    model.set_adapter("wider")
    stock = copy.deepcopy(model)
    fastpeft.restore(stock)
    rows = fastpeft.accelerate(model)
    assert {row.name for row in rows if row.status == "fused"} - names == {
        row.name for row in rows if "k_proj" in row.name
    }
    ids = models.tokens()
    expected, actual = (models.loss_and_gradients(m, ids) for m in (stock, model))
    for key, value in actual.items():
        assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-5), key
