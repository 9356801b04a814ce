"""Building and loading modules: the cache, errors, several modules in one process, the names of kernels."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from . import Emulation, build
from .emulation import kernel_name

pytestmark = pytest.mark.slow

INTRINSICS = Path(__file__).parent / "intrinsics"


def forbid_compiling(monkeypatch):
    def run(command, folder):
        raise AssertionError(f"compiled again: {command}")

    monkeypatch.setattr(build, "_run", run)


def test_a_second_build_compiles_nothing(monkeypatch):
    first = build.module("plain", INTRINSICS)
    forbid_compiling(monkeypatch)
    assert build.module("plain", INTRINSICS) == first


def test_a_change_compiles_the_changed_file_alone(monkeypatch, tmp_path):
    """Wherever the folder lies."""
    original = build.module("plain", INTRINSICS)
    changed = tmp_path / "intrinsics"
    shutil.copytree(INTRINSICS, changed)
    forbid_compiling(monkeypatch)
    assert build.module("plain", changed) == original
    monkeypatch.undo()
    commands = []
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command, folder: (commands.append(command), run(command, folder)))
    with (changed / "warp.cu").open("a") as file:
        file.write(f"// {tmp_path}\n")
    assert build.module("plain", changed) != original
    assert [name for command in commands for name in command if name.endswith((".cu", ".cpp"))] == [
        "intrinsics/warp.cu"
    ]


def test_an_error_of_the_compiler_is_told(tmp_path):
    (tmp_path / "spoiled").mkdir()
    (tmp_path / "spoiled" / "kernel.cu").write_text("int f() { return unknown_name; }\n")
    with pytest.raises(RuntimeError, match=r"spoiled/kernel.cu:1:18: error: .*unknown_name"):
        build.module("plain", tmp_path / "spoiled")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'fast'; allowed are plain, race, asan, debug"):
        build.module("fast")


def test_missing_headers_name_both_ways_to_get_them(monkeypatch):
    monkeypatch.setattr(build, "_toolkit_include", lambda: [])
    monkeypatch.setattr(build, "_packaged_include", lambda: [])
    with pytest.raises(RuntimeError, match="CUDA toolkit .* or `pip install cuda-toolkit"):
        build.cuda_include_flags()


def test_modules_have_settings_and_counts_of_their_own():
    plain, race = (Emulation(build.module(mode, INTRINSICS)) for mode in ("plain", "race"))
    for emulation in (plain, race):
        emulation.reset()
    out = np.zeros(6 * 32, np.uint32)
    plain.module.indices((1, 1, 1), (32, 1, 1), out.ctypes.data)
    assert plain.executed() == {"indices_kernel": 1}
    assert race.executed() == {}
    assert race.counters()["launches"] == 0
    plain.reset()
    assert plain.executed() == {}


def test_settings_are_checked():
    emulation = Emulation(build.module("plain", INTRINSICS))
    with pytest.raises(ValueError, match="order is 'sideways'; allowed are forward, reverse, random"):
        emulation.configure(order="sideways")
    with pytest.raises(ValueError, match="cp_async is 'never'; allowed are lazy, eager"):
        emulation.configure(cp_async="never")
    with pytest.raises(ValueError, match="sms is 0; there has to be at least one"):
        emulation.configure(sms=0)


def test_asan_without_its_runtime_says_what_to_do():
    with pytest.raises(ImportError, match="needs libasan: start the process with .*LD_PRELOAD"):
        Emulation(build.module("asan", Path(__file__).parent / "planted"))


def test_every_instance_of_a_kernel_is_listed():
    kernels = Emulation(build.module("plain", INTRINSICS)).kernels
    assert {"mma_kernel<__half>", "mma_kernel<__nv_bfloat16>", "load_matrices_kernel<4, true>"} <= set(kernels)
    assert len(kernels) == len(set(kernels))
    of_csrc = Emulation(build.module("plain")).kernels  # lambdas of kernels are in its symbol table, too
    assert len(of_csrc) == len(set(of_csrc))


@pytest.mark.parametrize(
    "signature, name",
    [
        ("fastpeft::(anonymous namespace)::f_kernel(float const*, int)", "f_kernel"),
        (
            "void fastpeft::(anonymous namespace)::f_kernel<__nv_bfloat16, true>(fastpeft::P)",
            "f_kernel<__nv_bfloat16, true>",
        ),
        ("void a::f_kernel<a::(anonymous namespace)::Tile<4> >(void (*)(int))", "f_kernel<Tile<4> >"),
    ],
)
def test_names_of_kernels_have_no_namespaces_and_no_parameters(signature, name):
    assert kernel_name(signature) == name
