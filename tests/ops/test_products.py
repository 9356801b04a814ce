"""Products of half types in float32, where the CPU is believed to have no instructions for them."""

import pytest
import torch

from fastpeft import accelerate, cpu
from fastpeft.ops import products


@pytest.fixture(params=["0", "1"])
def believed(request, monkeypatch):
    monkeypatch.setenv("FASTPEFT_CPU_HALF", request.param)
    cpu.multiplies_natively.cache_clear()
    yield request.param == "1"
    monkeypatch.undo()
    cpu.multiplies_natively.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_tiles_round_once_and_native_products_are_torchs(believed, dtype, monkeypatch):
    monkeypatch.setattr(products, "_TILE", 16)
    x, w, y = (torch.randn(s).to(dtype) for s in ((37, 50), (21, 50), (37, 21)))
    bias = torch.randn(21).to(dtype)
    got = products.linear(x, w, bias), products.addmm_(y.clone(), x, w.t(), 0.5), products.mm(x.t(), y)
    if believed:
        want = torch.nn.functional.linear(x, w, bias), torch.addmm(y, x, w.t(), alpha=0.5), torch.mm(x.t(), y)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        return
    x, w, y, bias = (t.double() for t in (x, w, y, bias))
    for a, exact in zip(got, (x @ w.t() + bias, y + 0.5 * x @ w.t(), x.t() @ y), strict=True):
        torch.testing.assert_close(a.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)


def test_accelerate_says_once_that_float32_is_faster(believed, caplog):
    cpu._say_once.cache_clear()
    wide, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    for each in (wide, model, model):
        accelerate(each)
    said = [record.getMessage() for record in caplog.records if "float32" in record.getMessage()]
    assert len(said) == (0 if believed else 1)
    assert all("bfloat16" in line and "model.float()" in line for line in said)
