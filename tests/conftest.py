import os
import zlib

# Before any import of transformers or bitsandbytes: tests must not wait for a hub that they do not need.
os.environ["HF_HUB_OFFLINE"] = "1"
# cuBLAS asks for it where torch.use_deterministic_algorithms is on (backends.py).
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import pytest
import torch

# Before any import of a Triton kernel: without a GPU, Triton's interpreter runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.backends import backend  # noqa: F401
from tests.executed import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401
from tests.sampled import pytest_configure, pytest_configure_node, pytest_report_header, sample  # noqa: F401

# pytest-xdist runs a process a core: threads of their own on top only take turns.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--one-of-each",
        action="store_true",
        help="one case of each test and backend, and none that compiles kernels or takes long (make check)",
    )


@pytest.fixture(autouse=True)
def _seeded(request):
    """Random inputs, the same in every run of a test; FASTPEFT_TEST_SEED draws others."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("FASTPEFT_TEST_SEED", "0")))


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    kept, dropped = items, []
    if config.getoption("--one-of-each"):
        kept, dropped = _one_of_each(items)
    elif config.sample_seed is not None:
        kept, dropped = sample(items, config.sample_seed)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _one_of_each(items):
    """(those that `make check` runs, the others)"""
    seen, kept, dropped = set(), [], []
    for item in items:
        runs_on = str(getattr(item, "callspec", None) and item.callspec.params.get("backend"))
        what = item.nodeid.partition("[")[0], runs_on
        left_out = item.get_closest_marker("slow") or item.get_closest_marker("gpu") or runs_on == "cuda-emulated"
        if left_out or what in seen:
            dropped.append(item)
        else:
            kept.append(item)
            seen.add(what)
    return kept, dropped
