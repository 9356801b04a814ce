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

# pytest-xdist runs a process a core: threads of their own on top only take turns.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request):
    """Random inputs, the same in every run of a test; FASTPEFT_TEST_SEED draws others."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("FASTPEFT_TEST_SEED", "0")))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
