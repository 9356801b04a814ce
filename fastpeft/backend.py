"""Which backend runs an op: an argument, then `use_backend`, then FASTPEFT_BACKEND, then the op's own rule.

`cuda` is the native module, `triton` the Triton kernels, `eager` PyTorch operations in the cheapest arrangement.
`reference` is the plain formula; it runs only when asked for by name.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import cache

import torch

from fastpeft import _native

NAMES = ("cuda", "triton", "eager", "reference")
_KERNELS = ("cuda", "triton")
HALF_TYPES = (torch.bfloat16, torch.float16)

_forced: ContextVar[str | None] = ContextVar("fastpeft_backend", default=None)
_logger = logging.getLogger("fastpeft")
_logged: set[tuple[str, str]] = set()


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} names the backend {name!r}; allowed are {', '.join(NAMES)}")
    return name


_from_environment = os.environ.get("FASTPEFT_BACKEND") or None
if _from_environment is not None:
    _checked(_from_environment, "FASTPEFT_BACKEND")


class use_backend:
    """`with fastpeft.use_backend("eager"): ...` forces one backend in this thread or task.

    An op whose arguments that backend cannot take raises and says why. An op that has no kernel of that name (the loss
    has none) runs as it would without; `backend=` as an argument of such an op raises.
    """

    def __init__(self, name: str):
        self.name = _checked(name, "use_backend")
        self._tokens: list[Token] = []

    def __enter__(self) -> use_backend:
        self._tokens.append(_forced.set(self.name))
        return self

    def __exit__(self, *exc_info) -> None:
        _forced.reset(self._tokens.pop())


def requested(backend: str | None) -> str | None:
    """The backend that the caller, the context or the environment asks for; None when nobody does."""
    if backend is not None:
        return _checked(backend, "backend=")
    return _forced.get() or _from_environment


@dataclass(frozen=True)
class Row:
    """A row of an op's decision table: on a GPU, the backend of the first row that holds is the fastest that is known.

    tokens: the most rows of x, or queries of a sequence. storage: of the weight, "nf4", "dense" or None for either.
    training: True where gradients are wanted, False where not, None for either. dtypes: of x; None for any. capability:
    of the GPU, the least. source: "modelled" (from bytes and instructions), or the benchmark and GPU whose figures say
    so.
    """

    backend: str
    reason: str
    source: str = "modelled"
    tokens: float = math.inf
    storage: str | None = None
    training: bool | None = None
    dtypes: tuple[torch.dtype, ...] | None = HALF_TYPES
    capability: tuple[int, int] = (8, 0)

    def holds(self, dtype: torch.dtype, capability: tuple[int, int], tokens: int, storage: str, training: bool) -> bool:
        return (
            tokens <= self.tokens
            and self.storage in (None, storage)
            and self.training in (None, training)
            and (self.dtypes is None or dtype in self.dtypes)
            and capability >= self.capability
        )


def preferred(table: Iterable[Row], x: torch.Tensor, tokens: int, storage: str, training: bool) -> Iterator[str]:
    """The backends of the rows that hold for a CUDA tensor x, best first."""
    capability = torch.cuda.get_device_capability(x.device)
    return (row.backend for row in table if row.holds(x.dtype, capability, tokens, storage, training))


def choose(
    op: str,
    rules: Mapping[str, Callable[..., str | None]],
    *args,
    backend: str | None = None,
    order: Iterable[str] | None = None,
) -> str:
    """Name of the backend for `op`.

    rules: backend name -> function of `args` that returns None when that backend can run them, else the reason why
    not. order: the names in order of preference, that of `rules` when None. What was asked for by name runs or raises;
    otherwise the first that can run does, and the reason why the preferred one could not is logged once. On its own, a
    kernel is chosen for a CUDA tensor only: on a CPU kernels are interpreted or emulated, for tests.
    """
    wanted = requested(backend)
    if wanted in _KERNELS and backend is None and wanted not in rules:
        wanted = None
    if wanted is not None:
        if wanted not in rules:
            raise ValueError(f"{op} has no backend {wanted!r}; it has {', '.join(rules)}")
        reason = rules[wanted](*args)
        if reason is not None:
            raise ValueError(f"{op} cannot run on backend {wanted!r}: {reason}")
        return wanted
    on_gpu = args[0].is_cuda
    for name in rules if order is None else order:
        if name in _KERNELS and not on_gpu:
            continue
        reason = rules[name](*args)
        if reason is None:
            return name
        if on_gpu and (op, reason) not in _logged:
            _logged.add((op, reason))
            _logger.info("%s does not use %s: %s", op, name, reason)
    raise ValueError(f"{op}: no backend can run these arguments")


def needs_cuda_module(tensor: torch.Tensor, *_args) -> str | None:
    """The rule that every native kernel shares: a native module, and a tensor where it computes."""
    if _native.cuda is None:
        return _native.why_absent
    if tensor.device.type != _native.cuda.device_type:
        return f"the tensor is on {tensor.device}"
    return None


def needs_triton(tensor: torch.Tensor, *_args) -> str | None:
    """The rule that every Triton kernel shares: Triton, and a CUDA tensor or Triton's interpreter."""
    if _why_no_triton() is not None:
        return _why_no_triton()
    if not tensor.is_cuda and not _triton_interprets():
        return f"the tensor is on {tensor.device} (Triton's interpreter runs there: TRITON_INTERPRET=1)"
    return None


@cache
def _why_no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None


def _triton_interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


def always(*_args) -> str | None:
    return None


def availability() -> dict[str, str | None]:
    """Backend name -> None when it can run on this machine, else why not."""
    no_gpu = None if torch.cuda.is_available() else "PyTorch sees no CUDA device"
    return {"cuda": _native.why_absent or no_gpu, "triton": _why_no_triton() or no_gpu, "eager": None}
