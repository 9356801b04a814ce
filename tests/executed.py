"""Which kernels the tests executed. A complete run that leaves a kernel of csrc/ or triton_kernels/ out fails."""

from __future__ import annotations

import ast
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATED, INTERPRETED = "cuda, emulated", "triton, interpreted"

_counts: dict[str, Counter[str]] = {EMULATED: Counter(), INTERPRETED: Counter()}


@contextmanager
def emulated(emulation):
    """Counts the launches of the emulated CUDA kernels; every template instance counts by itself."""
    emulation.reset()
    yield
    _counts[EMULATED].update(emulation.executed())


@contextmanager
def interpreted():
    """Counts the launches of Triton kernels in the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self, *args, **kwargs):
        _counts[INTERPRETED][self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    try:
        yield
    finally:
        InterpretedFunction.run = run


def triton_kernels() -> list[str]:
    """Names of the functions of triton_kernels/ that can be launched."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "triton_kernels").glob("*.py"))]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if function.name.endswith("_kernel")]


def is_complete(config) -> bool:
    """Whether all tests were asked for, as `make test` does."""
    option = config.option
    narrowed = option.keyword or option.markexpr or option.collectonly or getattr(option, "lf", False)
    narrowed = narrowed or option.one_of_each
    return config.args_source is config.ArgsSource.TESTPATHS and not narrowed


def _missing() -> dict[str, list[str]]:
    from tests import backends

    known = {EMULATED: backends.emulation().kernels, INTERPRETED: triton_kernels()}
    return {how: [kernel for kernel in kernels if not _counts[how][kernel]] for how, kernels in known.items()}


# The hooks below are pytest's; conftest.py imports them. Under pytest-xdist the workers hand their counts over.


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node, error):
    for how, counts in getattr(node, "workeroutput", {}).get("kernels", {}).items():
        _counts[how].update(counts)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["kernels"] = {how: dict(counts) for how, counts in _counts.items()}
    elif is_complete(config) and any(_missing().values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if any(_counts.values()):
        terminalreporter.section("kernels executed")
        for how, counts in _counts.items():
            for kernel, launches in sorted(counts.items()):
                terminalreporter.line(f"{how}: {launches:6d} x {kernel}")
    if is_complete(config):
        for how, kernels in _missing().items():
            for kernel in kernels:
                terminalreporter.line(f"{how}: NOT EXECUTED by any test: {kernel}", red=True)
