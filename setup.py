"""Builds the native module fastpeft._cuda from csrc/ with nvcc. Everything else is said in pyproject.toml.

FASTPEFT_BUILD_CUDA   auto (default): where nvcc and a GPU are found, for the GPUs that are there; a failed build only
                      warns. 1: always, and a failure is an error. 0: never.
FASTPEFT_CUDA_ARCHS   what `1` compiles for, default DEFAULT_ARCHS. The newest also goes in as PTX, for GPUs to come.
CUDA_HOME             whose bin/nvcc to use; without it the nvcc on PATH.

nvcc compiles and links every file, so only nvcc has to know where its toolkit is. Torch is not needed.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

DEFAULT_ARCHS = "80;86;89;90a;100a;120a"
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]

# One rule serves .cu and .cpp: nvcc hands the latter to the host compiler. --exclude-libs keeps the symbols of the
# static CUDA runtime inside the module, out of the way of the one that torch loads.
NINJA_FILE = """\
ninja_required_version = 1.5

rule compile
  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule link
  command = {nvcc} -shared -cudart=static -Xlinker=--exclude-libs,ALL $in -o $out
  description = link $out

{compilations}
build {module}: link {objects}
"""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def gpu_archs() -> list[str]:
    """The architectures of the GPUs that this process may use, asked of the driver; empty without one.

    From Hopper on the name ends in "a": it gives the kernels the instructions of that generation alone. GPUs before
    Ampere (8.0) have no bfloat16 instructions and are left out.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []

    def attribute(which: int, ordinal: int) -> int:
        device, value = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    capabilities = {(attribute(75, i), attribute(76, i)) for i in range(count.value)}
    return [f"{major}{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(capabilities) if major >= 8]


def wanted_archs() -> list[str]:
    wanted = os.environ.get("FASTPEFT_CUDA_ARCHS", DEFAULT_ARCHS)
    if not re.fullmatch(r"\d+a?(;\d+a?)*", wanted):
        raise CompileError(f"FASTPEFT_CUDA_ARCHS is {wanted!r}; it should look like {DEFAULT_ARCHS!r}")
    return sorted(wanted.split(";"), key=lambda arch: int(arch.rstrip("a")))


def gencode_flags(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the last. PTX of an "a" architecture would run on no later one."""
    newest = archs[-1].rstrip("a")
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


class BuildCuda(build_ext):
    def build_extension(self, ext):
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("FASTPEFT_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME to a CUDA toolkit")
        archs = gpu_archs() if ext.optional else wanted_archs()
        print(f"fastpeft: building {ext.name} with {nvcc} for {', '.join(archs)}", flush=True)

        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        for folder in (module.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        flags = [
            *NVCC_FLAGS,
            *gencode_flags(archs),
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            f'-DFASTPEFT_CUDA_ARCHS="{";".join(archs)}"',
        ]

        def path(value: Path) -> str:
            return re.sub(r"([$ :])", r"$\1", str(value))  # ninja's escapes

        object_of = {Path(source).resolve(): objects / f"{Path(source).name}.o" for source in ext.sources}
        (objects / "build.ninja").write_text(
            NINJA_FILE.format(
                nvcc=shlex.quote(nvcc),
                flags=shlex.join(flags),
                compilations="".join(
                    f"build {path(out)}: compile {path(source)}\n" for source, out in object_of.items()
                ),
                module=path(module),
                objects=" ".join(map(path, object_of.values())),
            )
        )
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(objects)]).returncode != 0:
            raise CompileError(f"nvcc could not build {ext.name}, see its messages above")


def extensions() -> list[Extension]:
    mode = os.environ.get("FASTPEFT_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FASTPEFT_BUILD_CUDA is {mode!r}; allowed are auto, 0 and 1")
    if mode == "0" or (mode == "auto" and not (find_nvcc() and gpu_archs())):
        return []
    sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc").glob(pattern))
    return [Extension("fastpeft._cuda", sources, optional=mode == "auto")]


if __name__ == "__main__":  # tests read the flags above without building
    setup(
        # triton_kernels/ stands at the top for its readers, but that name on PyPI belongs to others.
        packages=[*find_packages(include=["fastpeft", "fastpeft.*"]), "fastpeft.triton_kernels"],
        package_dir={"fastpeft.triton_kernels": "triton_kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildCuda},
    )
