"""Which backend is chosen: by name, by an op's decision table, and what happens where the preferred one cannot run."""

from types import SimpleNamespace

import pytest
import torch

from fastpeft import backend, ops, use_backend

GPU = SimpleNamespace(is_cuda=True)


def rules(**reasons):
    """Backends that can run (None) or cannot, and why."""
    return {name: lambda *_args, why=why: why for name, why in reasons.items()}


@pytest.mark.parametrize("op", ops.TABLES)
def test_tables_end_with_a_backend_that_always_runs_and_tell_why(op):
    table = ops.TABLES[op]
    for row in table:
        assert row.backend in backend.NAMES and len(row.reason) > 10 and row.source
    for dtype in (torch.float64, torch.bfloat16):
        for capability in ((7, 5), (9, 0)):
            chosen = [row.backend for row in table if row.holds(dtype, capability, 10**6, "nf4", True)]
            assert chosen[-1] == "eager"
            assert (chosen[0] == "eager") == (dtype == torch.float64 or capability < (8, 0))


def test_lora_linear_chooses_by_tokens_storage_and_training(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def best(tokens, storage, training, dtype=torch.bfloat16):
        x = SimpleNamespace(dtype=dtype, device="cuda:0")
        return next(backend.preferred(ops.TABLES["lora_linear"], x, tokens, storage, training))

    assert best(1, "nf4", False) == best(64, "dense", False) == "cuda"
    assert best(65, "nf4", False) == best(16, "nf4", True) == "triton"
    assert best(16, "dense", True) == best(513, "nf4", True) == "cuda"
    assert best(1, "nf4", False, torch.float32) == "eager"


def test_the_first_of_the_order_that_can_run_is_chosen():
    able = rules(cuda="not built", triton=None, eager=None)
    assert backend.choose("op", able, GPU) == "triton"
    assert backend.choose("op", able, GPU, order=["cuda", "eager", "triton"]) == "eager"
    assert backend.choose("op", able, torch.zeros(1)) == "eager"  # kernels run on a CPU by name only
    with pytest.raises(ValueError, match="no backend can run"):
        backend.choose("op", rules(cuda="not built"), GPU)


def test_a_backend_that_is_asked_for_runs_or_raises():
    able = rules(cuda="not built", eager=None)
    with pytest.raises(ValueError, match="op cannot run on backend 'cuda': not built"):
        backend.choose("op", able, GPU, backend="cuda")
    with use_backend("cuda"), pytest.raises(ValueError, match="not built"):
        backend.choose("op", able, GPU)
    with pytest.raises(ValueError, match="op has no backend 'triton'; it has cuda, eager"):
        backend.choose("op", able, GPU, backend="triton")
    with use_backend("triton"):  # no kernel of that name: the op's own choice
        assert backend.choose("op", able, GPU) == "eager"
    with use_backend("reference"), pytest.raises(ValueError, match="has no backend 'reference'"):
        backend.choose("op", able, GPU)
