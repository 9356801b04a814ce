"""Triton kernels and their launchers, one file an op, installed as `fastpeft.triton_kernels`.

`nf4.py` and `lora_linear.py` say how launchers look. `casts.py`, `dropout.py` and `products.py` are for several ops;
`tiles.py` holds launch configurations.
"""

# From the repository root this folder is importable under its own name as well: every kernel would exist twice.
if __name__ == "triton_kernels":
    raise ImportError("import fastpeft.triton_kernels, not triton_kernels")
