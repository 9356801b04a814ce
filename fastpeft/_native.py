"""The native module, or the reason why it is absent.

cuda: the module fastpeft._cuda, or None. why_absent: None, or a sentence that says why and what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("fastpeft._cuda"), None
    except ModuleNotFoundError:
        return None, (
            "the native module is not built for this Python; "
            "install fastpeft with FASTPEFT_BUILD_CUDA=1 where nvcc is (csrc/README.md)"
        )
    except ImportError as error:  # it is there, and does not load: an undefined symbol, a foreign libc
        return None, f"the native module is built but does not load ({error}); build it again on this machine"


cuda, why_absent = _load()


@contextmanager
def stream_on(device: torch.device) -> Iterator[int]:
    """Makes `device` the current one, as every kernel launch needs; gives the address of its current stream."""
    if device.type == "cpu":  # the module is compiled for the CPU, as tests do: it computes at once
        yield 0
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream().cuda_stream
