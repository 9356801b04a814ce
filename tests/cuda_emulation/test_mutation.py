"""The tests of the ops notice every barrier and every wait that is missing from a kernel."""

import os
import sys
from pathlib import Path

import pytest

from . import build, mutate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OPS = ROOT / "tests" / "ops"


# The tests of a file's kernels, by the beginning of its name: a file of tests/ops, and which of its tests. The longest
# that fits counts.
TESTS = {
    "nf4": ("test_nf4.py", ""),
    "dora_norm": ("test_dora_norm_kernels.py", ""),
    "dora_linear": ("test_dora_linear_kernels.py", ""),
    "lora_linear": ("test_lora_kernels.py", "not decode"),
    "lora_linear_add": ("test_dora_linear_kernels.py", ""),
    "lora_linear_decode": ("test_lora_kernels.py", "decode"),
    "prefix_attention_decode": ("test_prefix_attention_kernels.py", ""),
}


def op_tests(source: Path) -> tuple[Path, str]:
    fitting = [prefix for prefix in TESTS if source.stem.startswith(prefix)]
    assert fitting, f"no tests are known for {source.name}"
    file, chosen = TESTS[max(fitting, key=len)]
    return OPS / file, chosen


def outcome(module: Path, tests: Path, chosen: str = "") -> str:
    """ "caught" if `tests` fail, or the process dies, with this build of the kernels; "survived" if they pass.

    In a forked process: torch is imported there already, and a wild store of a mutant kills nothing else.
    """
    child = os.fork()
    if child == 0:
        status = 70  # none of pytest's
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            os.environ["FASTPEFT_EMULATION"] = str(module)
            for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
                del os.environ[name]
            backends = sys.modules.get("tests.backends")
            if backends is not None:
                backends.emulation.cache_clear()
            plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly")
            only = "cuda-emulated" + (f" and {chosen}" if chosen else "")
            status = pytest.main([str(tests), "-x", "-k", only, "--rootdir", str(ROOT), *plugins])
        finally:
            os._exit(int(status))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "caught"
    code = os.WEXITSTATUS(status)
    names = {pytest.ExitCode.OK: "survived", pytest.ExitCode.TESTS_FAILED: "caught"}
    assert code in names, f"pytest ended with {code} on {tests}"
    return names[code]


@pytest.mark.sampled
@pytest.mark.parametrize("mutant", mutate.mutants(), ids=str)
def test_mutation_is_caught(mutant, tmp_path):
    csrc = mutant.write(tmp_path)
    for mode in ("race", "plain"):
        if outcome(build.module(mode, csrc), *op_tests(mutant.source)) == "caught":
            return
    pytest.fail(f"{mutant}: the tests pass without it, in race mode and in plain mode")


def test_mutation_of_nothing_survives():
    """Unspoiled, the same tests pass: what catches a mutant is not the machinery."""
    assert outcome(build.module("race"), OPS / "test_nf4.py") == "survived"


def test_every_kernel_with_shared_memory_has_mutants():
    sources = {mutant.source.name for mutant in mutate.mutants()}
    for path in mutate.CSRC.glob("*.cu"):
        assert path.name in sources or "__shared__" not in path.read_text(), path.name
