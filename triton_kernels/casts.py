"""float32 from and to the dtypes of tensors, exact on a GPU and in Triton's interpreter.

The interpreter cuts a float32 off where bfloat16 ends instead of rounding it, and widens bfloat16 subnormals wrongly
(seen in Triton 3.6 to 3.9). Kernels are tested in it bit for bit, so there, and only there, both are done on the bits.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_float32(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x: float32, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = 0x7FC0  # a NaN could be rounded to an infinity, or to a zero
        return tl.where(x == x, nearest, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
