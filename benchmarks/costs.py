"""What each op must move and compute, whatever the kernel: bytes and operations as functions of its shapes.

A byte is counted once, as if every cache were large enough: these are floors, and measured times are compared with
them. Operations are those of the formula, a multiply-add being two; look-ups, conversions and addresses are not
counted. Letters as everywhere: M tokens, N out features, K in features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

ABSMAX_BLOCKSIZE = 256  # absmax values that share one second-level scale
_FLOAT = 4
_ABSMAX_CODE = 256 * _FLOAT
_ABSMAX_OFFSET = _FLOAT


@dataclass(frozen=True)
class Cost:
    read_bytes: int
    written_bytes: int
    cuda_core_ops: int
    tensor_core_ops: int = 0

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def nf4_storage_bytes(numel: int, blocksize: int = 64, nested: bool = True) -> int:
    """Two codes a byte; a float32 absmax per block, or nested one byte, and a float32 scale per 256 blocks."""
    blocks = _ceil_div(numel, blocksize)
    codes = _ceil_div(numel, 2)
    if not nested:
        return codes + blocks * _FLOAT
    return codes + blocks + _ceil_div(blocks, ABSMAX_BLOCKSIZE) * _FLOAT + _ABSMAX_CODE + _ABSMAX_OFFSET


def nf4_dequantize(numel: int, itemsize: int, blocksize: int = 64, nested: bool = True) -> Cost:
    """value * absmax: one multiply an element; nested, a multiply and an add a block."""
    blocks = _ceil_div(numel, blocksize)
    return Cost(
        read_bytes=nf4_storage_bytes(numel, blocksize, nested),
        written_bytes=numel * itemsize,
        cuda_core_ops=numel + (2 * blocks if nested else 0),
    )


def nf4_quantize(numel: int, itemsize: int, blocksize: int = 64) -> Cost:
    """An element: one maximum, one multiply, four comparisons (a search among 15 thresholds); a block: one division."""
    return Cost(
        read_bytes=numel * itemsize,
        written_bytes=nf4_storage_bytes(numel, blocksize, nested=False),
        cuda_core_ops=6 * numel + _ceil_div(numel, blocksize),
    )


def nf4_quantize_absmax(blocks: int) -> Cost:
    """An absmax: a subtraction, a maximum, a multiply, a multiply-add and a rounding to a step of the table, and eight
    comparisons (a search among 255 thresholds); 256 of them: one division."""
    groups = _ceil_div(blocks, ABSMAX_BLOCKSIZE)
    return Cost(
        read_bytes=blocks * _FLOAT + _ABSMAX_CODE + _ABSMAX_OFFSET,
        written_bytes=blocks + groups * _FLOAT,
        cuda_core_ops=14 * blocks + groups,
    )


def nf4_merge(
    N: int, K: int, R: int, itemsize: int, blocksize: int = 64, nested: bool = True, gain: bool = False
) -> Cost:
    """gain * (W + scaling * B A): the product on tensor cores, dequantization, scaling, sum and gain elsewhere."""
    dequantize = nf4_dequantize(N * K, itemsize, blocksize, nested)
    update = 2 * N * K if R else 0
    return Cost(
        read_bytes=dequantize.read_bytes + R * (N + K) * itemsize + (N * _FLOAT if gain else 0),
        written_bytes=dequantize.written_bytes,
        cuda_core_ops=dequantize.cuda_core_ops + update + (N * K if gain else 0),
        tensor_core_ops=2 * N * K * R,
    )


def dora_norm(
    N: int, K: int, R: int, adapter_itemsize: int, blocksize: int | None = 64, nested: bool = True, itemsize: int = 2
) -> Cost:
    """|W + scaling * B A| of each row; blocksize None: a dense W of `itemsize`. An element: dequantization, scaling and
    sum, square and sum. float32 adapters are six products of bfloat16: 24 bits are three times 8."""
    stored = N * K * itemsize if blocksize is None else nf4_storage_bytes(N * K, blocksize, nested)
    dequantize = 0 if blocksize is None else nf4_dequantize(N * K, itemsize, blocksize, nested).cuda_core_ops
    return Cost(
        read_bytes=stored + R * (N + K) * adapter_itemsize,
        written_bytes=N * _FLOAT,
        cuda_core_ops=dequantize + (4 if R else 2) * N * K,
        tensor_core_ops=2 * N * K * R * (6 if adapter_itemsize == _FLOAT else 1),
    )


def lora_linear_decode(
    M: int, N: int, K: int, R: int, itemsize: int, blocksize: int = 64, nested: bool = True, dense: bool = False
) -> Cost:
    """x W^T + scale * (x A^T) B^T: every product on tensor cores; dequantization, scale and sum elsewhere."""
    weight = Cost(N * K * itemsize, 0, 0) if dense else nf4_dequantize(N * K, itemsize, blocksize, nested)
    return Cost(
        read_bytes=weight.read_bytes + (M * K + R * (N + K)) * itemsize,
        written_bytes=M * N * itemsize,
        cuda_core_ops=weight.cuda_core_ops + (2 * M * N if R else 0),
        tensor_core_ops=2 * M * (N * K + R * (N + K)),
    )


def lora_linear(M: int, N: int, K: int, R: int, itemsize: int, blocksize: int = 64, nested: bool = True) -> Cost:
    """x W^T + scale * xa B^T with xa given; of dy W + scale * u A too, with N and K exchanged."""
    weight = nf4_dequantize(N * K, itemsize, blocksize, nested)
    return Cost(
        read_bytes=weight.read_bytes + (M * K + R * (M + N)) * itemsize,
        written_bytes=M * N * itemsize,
        cuda_core_ops=weight.cuda_core_ops + (2 * M * N if R else 0),
        tensor_core_ops=2 * M * N * (K + R),
    )


def lora_down(M: int, K: int, R: int, itemsize: int) -> Cost:
    """xa = x A^T; of u = dy B too, with N for K."""
    return Cost(
        read_bytes=(M * K + R * K) * itemsize,
        written_bytes=M * R * itemsize,
        cuda_core_ops=0,
        tensor_core_ops=2 * M * K * R,
    )


def lora_down_grad(M: int, K: int, R: int, itemsize: int) -> Cost:
    """dA = scale * u^T x; of dB = scale * dy^T xa too, with N for K."""
    return Cost(
        read_bytes=(M * K + M * R) * itemsize,
        written_bytes=R * K * itemsize,
        cuda_core_ops=R * K,
        tensor_core_ops=2 * M * K * R,
    )


def lora_up_grad(M: int, N: int, R: int, itemsize: int) -> Cost:
    """dB = scale * dy^T xa and u = dy B, with dy read once."""
    return Cost(
        read_bytes=(M * N + N * R + M * R) * itemsize,
        written_bytes=(N * R + M * R) * itemsize,
        cuda_core_ops=R * N,
        tensor_core_ops=4 * M * N * R,
    )


def dora_linear_add(M: int, N: int, itemsize: int, operands: int = 2) -> Cost:
    """out = keep * gain * x + offset, of `operands` matrices, one or two."""
    return Cost(
        read_bytes=operands * M * N * itemsize + N * _FLOAT,
        written_bytes=M * N * itemsize,
        cuda_core_ops=2 * M * N,
    )


def dora_linear_gain_grad(M: int, N: int, itemsize: int) -> Cost:
    """d_gain = sum of dy * z over the tokens."""
    return Cost(read_bytes=2 * M * N * itemsize, written_bytes=N * _FLOAT, cuda_core_ops=2 * M * N)


def lora_add(M: int, N: int, R: int, itemsize: int, gain: bool = False) -> Cost:
    """y += scale * xa B^T; with DoRA's gain out = gain * y + bias too."""
    outputs = 2 if gain else 1
    return Cost(
        read_bytes=(M * N + M * R + N * R) * itemsize + (N * (_FLOAT + itemsize) if gain else 0),
        written_bytes=outputs * M * N * itemsize,
        cuda_core_ops=2 * outputs * M * N,
        tensor_core_ops=2 * M * N * R,
    )


def prefix_attention_scores(B: int, H: int, S: int, T: int, P: int, causal: bool = True) -> int:
    """How many there are that somebody sees."""
    real = S * (T - S) + S * (S + 1) // 2 if causal else S * T
    return B * H * (S * P + real)


def prefix_attention(
    B: int, H: int, Hkv: int, S: int, T: int, P: int, D: int, itemsize: int, causal: bool = True
) -> Cost:
    """Two products; of each score a scale, a maximum, a difference, an exponential and a sum."""
    scores = prefix_attention_scores(B, H, S, T, P, causal)
    return Cost(
        read_bytes=(B * H * S + 2 * Hkv * (B * T + P)) * D * itemsize,
        written_bytes=B * H * S * (D * itemsize + _FLOAT),
        cuda_core_ops=5 * scores,
        tensor_core_ops=2 * 2 * scores * D,
    )


def prefix_attention_dq(
    B: int, H: int, Hkv: int, S: int, T: int, P: int, D: int, itemsize: int, causal: bool = True
) -> Cost:
    """delta, a product of each element; three products; of each score a scale, two differences, an exponential and a
    product."""
    scores = prefix_attention_scores(B, H, S, T, P, causal)
    return Cost(
        read_bytes=(3 * B * H * S + 2 * Hkv * (B * T + P)) * D * itemsize + B * H * S * _FLOAT,
        written_bytes=B * H * S * (D * itemsize + _FLOAT),
        cuda_core_ops=5 * scores + 2 * B * H * S * D,
        tensor_core_ops=2 * 3 * scores * D,
    )


def prefix_attention_dkv(B: int, H: int, Hkv: int, S: int, T: int, D: int, itemsize: int, causal: bool = True) -> Cost:
    """dk and dv of the real keys: four products; of each score as in dq."""
    scores = prefix_attention_scores(B, H, S, T, 0, causal)
    return Cost(
        read_bytes=(2 * B * H * S + 2 * B * Hkv * T) * D * itemsize + 2 * B * H * S * _FLOAT,
        written_bytes=2 * B * Hkv * T * D * itemsize,
        cuda_core_ops=5 * scores,
        tensor_core_ops=2 * 4 * scores * D,
    )


def scale_columns(M: int, C: int, itemsize: int) -> Cost:
    """dx = gain * dy and the sums of dy * x over M."""
    return Cost(read_bytes=2 * M * C * itemsize + C * _FLOAT, written_bytes=M * C * itemsize + C * _FLOAT,
                cuda_core_ops=3 * M * C)  # fmt: skip


def bottleneck(M: int, K: int, R: int, itemsize: int) -> Cost:
    """A direction: pre = x D^T and y = x + act(pre) U^T, or dpre and dx; x is read once."""
    return Cost(
        read_bytes=(M * K + 2 * R * K) * itemsize,
        written_bytes=(M * K + M * R) * itemsize,
        cuda_core_ops=2 * M * K,
        tensor_core_ops=4 * M * K * R,
    )


def bottleneck_grad(M: int, K: int, R: int, itemsize: int) -> Cost:
    """dU^T = act(pre)^T dy and the sums of dy; dD = dpre^T x without them."""
    return Cost(
        read_bytes=(M * K + M * R) * itemsize,
        written_bytes=(R + 1) * K * _FLOAT,
        cuda_core_ops=M * K,
        tensor_core_ops=2 * M * K * R,
    )
