"""nf4_dequantize, nf4_quantize, nf4_quantize_absmax: the 4-bit storage of bitsandbytes, bit for bit.

The meaning of each, and the storage itself, stand in `fastpeft/reference/nf4.py`. The launchers at the end of this file
take contiguous tensors of one device, write into their outputs and return nothing. The caller has checked dtypes and
sizes and has made the tensors' device the current one. A launch is an ordinary `kernel[grid](...)`, without autotuning
and with nothing asked of the device: it can be captured in a CUDA graph, and compiled where there is no GPU
(`triton.compile(ASTSource(...), target=GPUTarget("cuda", 90, 32))`).

Work split: a program owns a tile, 16 kB of the floating-point tensor, which it writes (dequantize) or reads (quantize):
4 or 2 vectors of 16 bytes a thread, all under way before the first is waited for. Tensors are flat. Where a tile starts
is int64, places inside it are int32. A tile is whole blocks, so rows of the weight do not matter.

Widths: codes have the shape [vectors, V / 2], V elements being 16 bytes, so that a thread holds the codes of its own
vectors and a warp touches contiguous memory on both sides. As one axis Triton would load them 16 bytes a thread and
send them through shared memory. A mask must not undo this: Triton has to see that it is the same for a whole vector. In
dequantize it does where numel is a multiple of 32, as in any real weight. Other sizes, and pointers that are not
16-byte aligned, compile to a second version of narrower accesses. Quantize masks whole blocks; a last block that is
shorter has a launch of its own.

Bits: bitsandbytes rounds after every operation, so kernels are launched with enable_fp_fusion=False (PTX then says
mul.rn and add.rn, which nothing contracts) and divide by `tl.div_rn`: `/` is an approximation for float32.

Cost, modelled, for 4096x4096 in bf16 with blocks of 64 on an H100 (3.0 to 3.35 TB/s; 132 SMs of 4 instructions a cycle
at 1.76 GHz); instructions counted in Triton 3.9's machine code for sm_90. Nothing here was timed yet.

    dequantize, nested    8.4 MB codes, 0.3 MB absmax in, 33.6 MB out    13 to 14 us; 11 instructions an element: 6 us
    quantize              33.6 MB in, 8.4 MB codes, 1.0 MB absmax out    13 to 14 us; 33 instructions an element: 18 us

The look-up of 16 values is `tl.gather`: through shared memory, one value a bank, so that 32 lanes never conflict. A
table in global memory takes as many instructions, 64-bit addresses and one more tensor on each device; a tree of
selects takes 8 more an element. Quantize looks for the nearest of 16 values by bisection, whose first step needs no
look-up; comparing with all midpoints would take 29 more an element. It is bound by its instructions, not by memory, and
done once for a weight.
"""

import triton
import triton.language as tl

from .casts import round_to, to_float32

# With 4 vectors a thread dequantize takes 32 registers on sm_90: 8 programs fill an SM. Quantize keeps more of each
# element: 80 registers with 4 vectors, 170 on sm_80. With 2 vectors it takes up to 64, so that 2 programs share an SM
# and one computes while the other is at a barrier; on sm_80 it takes 86, one program.
TILE_BYTES = 16384
DEQUANTIZE_WARPS = 8
QUANTIZE_WARPS = 16

NF4_VALUES = tl.constexpr(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
# Sums of two float32 are exact here, so each midpoint is rounded once, when it becomes a float32. The last is a filler.
NF4_MIDPOINTS = tl.constexpr(
    tuple((a + b) / 2 for a, b in zip(NF4_VALUES.value, NF4_VALUES.value[1:], strict=False)) + (float("inf"),)
)
TINY = tl.constexpr(1e-38)  # what a block of zeros is divided by

ABSMAX_BLOCKSIZE = tl.constexpr(256)  # absmax values that share a second-level scale
# bitsandbytes rounds to the 8-bit code by way of a table over [-1, 1] with this many steps.
ABSMAX_STEPS = tl.constexpr(65535)


@triton.jit
def table_of(values: tl.constexpr):
    """Sixteen constants as a tensor. It takes a thread 30 instructions, about one for each of its elements of bf16."""
    i = tl.arange(0, 16)
    table = tl.full([16], values[15], tl.float32)
    for k in tl.static_range(15):
        table = tl.where(i == k, values[k], table)
    return table


@triton.jit
def look_up(table, index):
    return tl.gather(table, index.reshape([index.numel]), 0).reshape(index.shape)


@triton.jit
def nf4_dequantize_kernel(
    packed,
    absmax,
    absmax_code,
    absmax_scale,
    absmax_offset,
    out,
    packed_numel,  # for its mask: that this is a multiple of 16 could not be seen in (numel + 1) // 2
    numel,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[i] = value[code i] * absmax[i / BLOCKSIZE], in float32, rounded once; a nested absmax is decoded here."""
    tl.static_assert(TILE % BLOCKSIZE == 0 and TILE // BLOCKSIZE <= ABSMAX_BLOCKSIZE, "blocksize is not one of NF4's")
    V: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(numel - start, TILE).to(tl.int32)
    bytes_left = tl.minimum(packed_numel - start // 2, TILE // 2).to(tl.int32)
    vector = tl.arange(0, TILE // V)
    byte = vector[:, None] * (V // 2) + tl.arange(0, V // 2)
    element = vector[:, None] * V + tl.arange(0, V)
    first_block = start // BLOCKSIZE
    block = vector * V // BLOCKSIZE  # a vector lies in one block, since V divides BLOCKSIZE

    codes = tl.load(packed + start // 2 + byte, mask=byte < bytes_left).to(tl.int32)
    scale = tl.load(absmax + first_block + block, mask=vector * V < left)  # [TILE / V]
    if absmax_code is not None:
        # The blocks of a tile, at most 256, start at a multiple of their number: they share one second-level scale. The
        # look-up waits for one load, but the 1 kB of absmax_code stays in L1 from program to program.
        group_scale = tl.load(absmax_scale + first_block // ABSMAX_BLOCKSIZE)
        scale = tl.load(absmax_code + scale.to(tl.int32)) * group_scale + tl.load(absmax_offset)

    index = tl.interleave(codes >> 4, codes & 15)  # [TILE / V, V]
    values = look_up(table_of(NF4_VALUES), index) * scale[:, None]
    tl.store(out + start + element, round_to(values, out.dtype.element_ty), mask=element < left)


@triton.jit
def _magnitude(x):
    """|x| as an int32 of the same order, in which NaN is above infinity: a maximum is NaN where one of them is."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _nearest_codes(normalized, V: tl.constexpr):
    """The index of the nearest NF4 value, two a byte: uint8 [elements / V, V / 2]."""
    # It is the number of midpoints below. No comparison with NaN holds, which makes 15 of it.
    midpoints = table_of(NF4_MIDPOINTS)
    index = tl.where(normalized <= NF4_MIDPOINTS[7], 0, 8)
    for level in tl.static_range(3):
        half = 4 >> level
        index += tl.where(normalized <= look_up(midpoints, index + (half - 1)), 0, half)
    high, low = tl.split(index.reshape([index.numel // V, V // 2, 2]))
    return (high << 4 | low).to(tl.uint8)


@triton.jit(do_not_specialize=["blocks"])
def nf4_quantize_kernel(weight, packed, absmax, blocks, BLOCKSIZE: tl.constexpr, TILE: tl.constexpr):
    """The blocks that are whole; blocks: their number."""
    tl.static_assert(TILE % BLOCKSIZE == 0, "blocksize is not one of NF4's")
    V: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    BLOCKS: tl.constexpr = TILE // BLOCKSIZE
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first_block * BLOCKSIZE
    left = tl.minimum(blocks - first_block, BLOCKS).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    x = to_float32(tl.load(weight + start + element, mask=(block < left)[:, None], other=0))  # [BLOCKS, BLOCKSIZE]

    largest = tl.max(_magnitude(x), 1).to(tl.float32, bitcast=True)
    tl.store(absmax + first_block + block, largest, mask=block < left)
    reciprocal = tl.div_rn(1.0, tl.where(largest < TINY, TINY, largest))
    codes = _nearest_codes(x * reciprocal[:, None], V)

    vector = tl.arange(0, TILE // V)
    byte = vector[:, None] * (V // 2) + tl.arange(0, V // 2)
    tl.store(packed + start // 2 + byte, codes, mask=(vector * V // BLOCKSIZE < left)[:, None])


@triton.jit(do_not_specialize=["size"])
def nf4_quantize_last_block_kernel(weight, packed, absmax, size, BLOCKSIZE: tl.constexpr):
    """The block at the end that has only `size` elements. bitsandbytes divides here, and stores TINY for zeros."""
    element = tl.arange(0, BLOCKSIZE)
    byte = tl.arange(0, BLOCKSIZE // 2)[:, None]
    x = to_float32(tl.load(weight + element, mask=element < size, other=0))
    largest = tl.max(_magnitude(x), 0).to(tl.float32, bitcast=True)
    divisor = tl.where(largest < TINY, TINY, largest)
    tl.store(absmax, divisor)
    normalized = tl.where(element < size, tl.div_rn(x, divisor), 0.0)  # half a byte at the end holds the code of 0.0
    tl.store(packed + byte, _nearest_codes(normalized, 2), mask=byte * 2 < size)


@triton.jit(do_not_specialize=["blocks"])
def nf4_quantize_absmax_kernel(absmax, offset, absmax_code, absmax_u8, absmax_scale, blocks):
    """A program does the values of one second-level scale. They are few, so the search reads absmax_code from L1."""
    group = tl.program_id(0).to(tl.int64)
    absmax += group * ABSMAX_BLOCKSIZE
    i = tl.arange(0, ABSMAX_BLOCKSIZE)
    inside = i < blocks - group * ABSMAX_BLOCKSIZE
    x = tl.where(inside, tl.load(absmax + i, mask=inside) - tl.load(offset), 0.0)
    scale = tl.max(tl.where(x == x, _magnitude(x), 0), 0).to(tl.float32, bitcast=True)  # NaN does not count
    tl.store(absmax_scale + group, scale)

    normalized = x * tl.div_rn(1.0, scale)
    step = tl.floor((normalized + 1.0) * (0.5 * ABSMAX_STEPS) + 0.5)
    step = tl.where(step > 0.0, tl.where(step < ABSMAX_STEPS, step, ABSMAX_STEPS), 0.0)
    entry = step * (2 / ABSMAX_STEPS) - 1.0
    code = tl.zeros_like(i)  # the number of midpoints below entry
    for level in tl.static_range(8):
        half = 128 >> level
        below = absmax_code + code + (half - 1)
        midpoint = (tl.load(below) + tl.load(below + 1)) * 0.5
        code += tl.where(midpoint < entry, half, 0)
    code = tl.where(normalized == normalized, code, 0)
    tl.store(absmax_u8 + group * ABSMAX_BLOCKSIZE + i, code.to(tl.uint8), mask=inside)


def _tile(tensor):
    return TILE_BYTES // tensor.element_size()


def nf4_dequantize(packed, absmax, absmax_code, absmax_scale, absmax_offset, blocksize, out):
    """packed: uint8 [ceil(numel / 2)]. blocksize: a power of two, 32 to 4096. out: [numel] bf16|fp16|fp32, any shape.

    absmax: float32 [blocks], and the next three None; or, nested, uint8 [blocks], with absmax_code float32 [256],
    absmax_scale float32 [ceil(blocks / 256)] and absmax_offset, one float32.
    """
    if out.numel() == 0:
        return
    grid = (triton.cdiv(out.numel(), _tile(out)),)
    nf4_dequantize_kernel[grid](
        packed,
        absmax,
        absmax_code,
        absmax_scale,
        absmax_offset,
        out,
        packed.numel(),
        out.numel(),
        BLOCKSIZE=blocksize,
        TILE=_tile(out),
        num_warps=DEQUANTIZE_WARPS,
        enable_fp_fusion=False,
    )


def nf4_quantize(weight, blocksize, packed, absmax):
    """weight: [numel] bf16|fp16|fp32, any shape. blocksize: a power of two, 32 to 4096.

    packed: uint8 [ceil(numel / 2)]. absmax: float32 [ceil(numel / blocksize)]. A last block that is shorter than the
    others takes a second launch.
    """
    blocks = weight.numel() // blocksize
    if blocks > 0:
        grid = (triton.cdiv(blocks * blocksize, _tile(weight)),)
        nf4_quantize_kernel[grid](
            weight,
            packed,
            absmax,
            blocks,
            BLOCKSIZE=blocksize,
            TILE=_tile(weight),
            num_warps=QUANTIZE_WARPS,
            enable_fp_fusion=False,
        )
    rest = weight.view(-1)[blocks * blocksize :]
    if rest.numel() > 0:
        nf4_quantize_last_block_kernel[(1,)](
            rest,
            packed[blocks * blocksize // 2 :],
            absmax[blocks:],
            rest.numel(),
            BLOCKSIZE=blocksize,
            num_warps=8,  # one program
            enable_fp_fusion=False,
        )


def nf4_quantize_absmax(absmax, offset, absmax_code, absmax_u8, absmax_scale):
    """The second level of double quantization: `absmax - offset` in 8 bits.

    absmax: float32 [blocks]. offset: one float32, their mean. absmax_code: float32 [256], ascending. absmax_u8: uint8
    [blocks]. absmax_scale: float32 [ceil(blocks / 256)].
    """
    if absmax.numel() == 0:
        return
    grid = (triton.cdiv(absmax.numel(), ABSMAX_BLOCKSIZE.value),)
    nf4_quantize_absmax_kernel[grid](
        absmax,
        offset,
        absmax_code,
        absmax_u8,
        absmax_scale,
        absmax.numel(),
        num_warps=4,  # 2 values a thread
        enable_fp_fusion=False,
    )
