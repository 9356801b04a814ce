"""norm_cache: whatever changes a DoRA layer, its next call sees it; where nothing changes, nothing is made again."""

import copy
import gc

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpeft.nn import DoRALinear, norm_cache

K, N, R = 64, 48, 4


def layer_over(base: str = "dense") -> DoRALinear:
    if base == "dense":
        linear = nn.Linear(K, N)
    else:
        linear = bnb.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer = DoRALinear(linear, r=R)
    nn.init.normal_(layer.lora_B.weight, std=0.2)
    for module in layer.modules() if base == "dense" else (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        for name, parameter in list(module.named_parameters(recurse=False)):  # of version 0, as if loaded
            setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    return layer


@pytest.fixture
def made(monkeypatch):
    """The number of norms that were made."""
    calls, dora_norm = [], norm_cache.dora_norm
    monkeypatch.setattr(norm_cache, "dora_norm", lambda *arguments: calls.append(1) or dora_norm(*arguments))
    norm_cache.forget()
    return calls


def trainable(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def step(layer, optimizer):
    layer(torch.randn(9, K)).square().sum().backward()
    optimizer.step()


def optimizer_step(make):
    def change(layer):
        mode, grad = layer.training, torch.is_grad_enabled()
        with torch.enable_grad():
            step(layer.train(), make(trainable(layer)))
        layer.train(mode)
        assert torch.is_grad_enabled() == grad

    return change


def ema_swap(layer):
    for parameter in trainable(layer):
        parameter.data.copy_(parameter.data * 0.9 + 0.1 * torch.randn_like(parameter))


def replace_data(layer):
    layer.lora_A.weight.data = torch.randn(R, K)


def load(assign):
    def change(layer):
        layer.load_state_dict({"lora_A.weight": torch.randn(R, K)}, strict=False, assign=assign)

    return change


def merge_and_unmerge_another(layer):
    """As when a second adapter is merged into the weight: the base has other numbers afterwards."""
    layer.merge()
    layer._unmerged.clear()


def in_place(layer):
    with torch.no_grad():
        layer.lora_B.weight.mul_(1.5)


def write_base(layer):
    """Every byte, in place, where neither version nor address tell."""
    weight = layer.base.weight.data
    weight.copy_(weight.flip(0))


def write_base_row(layer):
    rows = layer.base.weight.data.view(N, -1)
    rows[7] = rows[8]


def rescale(layer):
    layer.alpha = 3 * layer.alpha


# Path -> (the change, whether `_version` of A, B, magnitude or weight tells). Where it does not, a cache that is keyed
# on versions alone is stale: the test below asserts that, too.
PATHS = {
    "fused AdamW": (optimizer_step(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)), False),
    "AdamW": (optimizer_step(lambda p: torch.optim.AdamW(p, lr=0.1)), True),
    "8-bit AdamW": (optimizer_step(lambda p: bnb.optim.AdamW8bit(p, lr=0.1, min_8bit_size=1)), False),
    "EMA through .data": (ema_swap, False),
    ".data replaced": (replace_data, False),
    "load_state_dict": (load(False), True),
    "load_state_dict(assign=True)": (load(True), False),
    "merge": (merge_and_unmerge_another, False),
    "scaling": (rescale, False),
    "in place under no_grad": (in_place, True),
    "base written through .data": (write_base, False),
    "a row of the base": (write_base_row, False),
}
# In place, through .data: a device cannot be asked without waiting for it (the module's docstring).
SILENT = ("EMA through .data", "base written through .data", "a row of the base")


def versions(layer):
    return [p._version for p in (layer.base.weight, *trainable(layer))]


@pytest.mark.parametrize("base", ("dense", "nf4"))
@pytest.mark.parametrize("readable", (True, False), ids=("cpu", "as-on-a-gpu"))
@pytest.mark.parametrize("decoding", (False, True), ids=("training", "decoding"))
@pytest.mark.parametrize("path", PATHS)
def test_a_changed_layer_is_seen(path, decoding, readable, base, monkeypatch, made):
    monkeypatch.setattr(norm_cache, "_is_readable", lambda tensor: readable)
    change, told_by_version = PATHS[path]
    layer, x = layer_over(base).train(not decoding), torch.randn(3, K)
    with torch.set_grad_enabled(not decoding):
        before, known = layer(x), versions(layer)
        change(layer)
        assert (versions(layer) != known) == told_by_version
        if path in SILENT and decoding and base == "nf4" and not readable:
            assert torch.equal(norm_cache.folded(layer.base, *trainable(layer), layer.scaling)[1],
                               norm_cache.folded(layer.base, *trainable(layer), layer.scaling)[1])  # fmt: skip
            norm_cache.forget()
        after = layer(x)
        norm_cache.forget()
        assert torch.equal(layer(x), after) and not torch.allclose(after, before, atol=1e-5)


def test_made_once_per_optimizer_step(made):
    """Four accumulation steps, each with a checkpoint's recomputation; then the optimizer moves, and once more."""
    layers = nn.Sequential(layer_over(), nn.Linear(N, K), layer_over("nf4"))
    optimizer = torch.optim.AdamW([p for p in layers.parameters() if p.requires_grad], lr=0.1, fused=True)
    for steps in range(1, 4):
        for reentrant in (False, True, False, True):
            x = torch.randn(9, K, requires_grad=True)
            checkpoint(layers, x, use_reentrant=reentrant).square().sum().backward()
        assert len(made) == 2 * steps
        optimizer.step()
        optimizer.zero_grad()


def test_as_on_a_gpu_a_norm_is_made_at_each_call_and_a_fold_once(made, monkeypatch):
    monkeypatch.setattr(norm_cache, "_is_readable", lambda tensor: False)
    layer, x = layer_over("nf4"), torch.randn(3, K)
    for _ in range(3):
        layer(x)
    assert len(made) == 3
    with torch.no_grad():
        for _ in range(3):
            layer.eval()(x)
    assert len(made) == 4


def test_decoding_runs_the_plain_lora_kernel(made, monkeypatch):
    from fastpeft.nn import dora

    layer, x = layer_over("nf4").eval(), torch.randn(2, 3, K)
    expected = layer(x)  # gradients are on: not folded
    monkeypatch.setattr(dora, "dora_linear", None)
    with torch.no_grad():
        for _ in range(4):
            assert torch.allclose(layer(x), expected, atol=1e-5)
            assert layer(x[0, 0]).shape == (N,)
    assert len(made) == 1
    with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):
        layer(torch.randn(65, K))  # not a decoding step: the gain goes into the product's epilogue


def test_zero_rows_and_magnitudes_fold():
    layer, x = layer_over("nf4").eval(), torch.randn(3, K)
    layer.lora_magnitude_vector.weight.data[:2] = torch.tensor([0.0, -1.0])
    expected = layer(x)
    with torch.no_grad():
        got = layer(x)
    assert torch.allclose(got, expected, atol=1e-5) and torch.equal(got[:, 0], layer.base.bias[0].expand(3))


def test_models_and_optimizers_do_not_disturb_each_other(made):
    first, second, x = layer_over(), layer_over(), torch.randn(3, K)
    optimizers = [torch.optim.AdamW(trainable(layer), lr=0.1, fused=True) for layer in (first, second)]
    for _ in range(3):
        for layer, optimizer in zip((first, second), optimizers, strict=True):
            step(layer, optimizer)
            for other in (first, second):
                cached = other(x)
                norm_cache.forget()
                assert torch.equal(other(x), cached)


def test_a_step_between_forward_and_backward_of_another_model_is_harmless():
    layer, other, x = layer_over(), layer_over(), torch.randn(3, K)
    layer(x).sum().backward()
    expected = [p.grad.clone() for p in trainable(layer)]
    layer.zero_grad()
    y = layer(x)
    step(other, torch.optim.AdamW(trainable(other), fused=True))
    y.sum().backward()
    assert all(map(torch.equal, expected, (p.grad for p in trainable(layer))))


def test_a_captured_graph_makes_its_own_norm(made, monkeypatch):
    """Or a replay would use the norm of the capture for ever."""
    layer, x = layer_over("nf4"), torch.randn(3, K)
    layer(x)
    monkeypatch.setattr(norm_cache, "_is_capturing", lambda tensor: True)
    layer(x)
    with torch.no_grad():
        layer.eval()(x)
    assert len(made) == 3


@pytest.mark.parametrize("base", ("dense", "nf4"))
@pytest.mark.parametrize("training", (True, False))
def test_a_compiled_layer_sees_every_change(base, training):
    layer, x = layer_over(base).train(training), torch.randn(3, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for change in (lambda layer: None, ema_swap, PATHS["fused AdamW"][0]):
        with torch.set_grad_enabled(training):
            change(layer)
            norm_cache.forget()
            assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_inference_mode_does_not_spoil_training():
    layer, x = layer_over(), torch.randn(3, K)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(y, expected)


def test_tensor_scaling_is_compared(made):
    layer, scaling = layer_over(), torch.tensor(1.5)
    factors = (layer.base, layer.lora_A.weight, layer.lora_B.weight)
    first = norm_cache.norm(*factors, scaling)
    assert norm_cache.norm(*factors, scaling) is first
    scaling.data.fill_(2.5)  # as a hotswap does it
    assert not torch.allclose(norm_cache.norm(*factors, scaling), first) and len(made) == 2


def test_nothing_is_kept_alive_or_copied():
    norm_cache.forget()
    layer, x = layer_over("nf4"), torch.randn(3, K)
    layer(x)
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        clone.eval()(x)
        ema_swap(clone)
        assert not torch.allclose(clone(x), layer(x), atol=1e-4)
    assert len(norm_cache._norms) == 2 and len(norm_cache._folds) == 1
    del layer, clone
    gc.collect()
    assert len(norm_cache._norms) == len(norm_cache._folds) == 0
