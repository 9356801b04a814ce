"""Triton kernels and their launchers, one file an op, installed as `fastpeft.triton_kernels`.

`casts.py` is for all of them; `nf4.py` says how launchers look.
"""

# From the repository root this folder is importable under its own name as well: every kernel would exist twice.
if __name__ == "triton_kernels":
    raise ImportError("import fastpeft.triton_kernels, not triton_kernels")
