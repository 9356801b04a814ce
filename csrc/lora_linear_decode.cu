// lora_linear_decode: y = gain * (x W^T + scale * (x A^T) B^T) + bias for 1 to 64 tokens, W in NF4 or dense; two
// launches.
//
// Bound by memory: 4096 x 4096 in NF4 with rank 16 are 8.9 MB, 2.7 to 3.0 us at 3.35 to 3.0 TB/s (H100); 4096 -> 14336
// 31 MB. So codes go from global memory to registers, each once, and 2 to 3 kB of them are on their way for each warp.
// Next comes shared memory, in wavefronts for the 2048 weights that a warp multiplies at a time: 32 of look-ups, 8 for
// each eight tokens, about 24 of copies, codes and scales. That is 64 at M = 8, 2.3 us of all SMs together, and 120 at
// M = 64, 4.2 us, as long as mma.sync needs there. Last the issue slots: 2.5 instructions a weight in the loop of
// sm_90a with nested absmax, 1.4 us (M <= 16: 2.9, 32: 2.9, 64: 4.2). All modelled.
//
// Variants of the look-up, in instructions a weight of the same loop at M <= 8: a byte as a pair of T, a column for
// each lane, 2.5; the same in lines of 128 bytes, 3.5, since an address is a shift and a LOP3; a nibble by a
// shuffle, 3.9 and twice the wavefronts; byte permutations of a table in registers, 4.9, most of them on a pipe of half
// the rate.
//
// Products are mma.m16n8k16 from M = 1 on: W is the 16-row operand and eight tokens the other, so a token is a column
// and a weight is looked up once for all of them. The absmax is applied in float32 to the sum of a slice of 64 weights.
//
// Work split. A warp multiplies 32 rows (dense: 16) by a slice of 64 elements of K; the eight of a CTA are 1 x 8 (rows
// x K) for M <= 8, 2 x 4, 4 x 2, 8 x 1 for M <= 64, so that a stage of x is always 8 kB in shared memory, and its
// traffic from L2 about that of the codes. The rows of A are multiplied in the same launch by CTAs of their own. The
// CTAs, as many as fit on the device, divide each matrix evenly (Split): N = 1024 keeps all SMs busy, and N = 14336 has
// no tail of a last wave. What a CTA sums over its part of K goes to the workspace in float32; the second kernel adds
// these partials in fixed order and does the rest. On sm_90 and later its launch overlaps the end of the first.
//
// Shared memory: 64 kB of table and x, 4 kB of scales, 1 kB of absmax_code, up to 16 kB to add the sums of warps. Two
// CTAs an SM for M <= 16, by registers (128) and shared memory; above that one.
//
// K % 8 == 0; x, W, A aligned to 16 bytes, packed codes to 4 (cudaErrorInvalidValue otherwise). The table serves
// K % 64 == 0, blocksize >= 64 and codes aligned to 8; other NF4 weights are dequantized one by one (Nf4Words), 9 to
// 10 instructions a weight.
#include <algorithm>
#include <cmath>

#include "lora_linear_decode.cuh"
#include "nf4.cuh"

namespace fastpeft {
namespace decode {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Device {
  int sms, smem_bytes, major;
};

cudaError_t current_device(Device& device) {
  int ordinal;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.smem_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, ordinal);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, ordinal);
  return error;
}

Kind kind_of(const LoraLinearDecodeParams& p) {
  if (p.weight) return Kind::dense;
  const bool whole = p.K % kSlice == 0 && p.nf4.blocksize >= kSlice && is_aligned(p.nf4.packed, 8);
  return whole ? Kind::nf4_rows : Kind::nf4_words;
}

// Kind::nf4_words is for shapes that are rare: two kernels instead of four.
int tiles_of(Kind kind, int M) {
  if (M <= 8) return 1;
  if (kind == Kind::nf4_words) return 8;
  return M <= 16 ? 2 : M <= 32 ? 4 : 8;
}

// Divides among as many CTAs as have two slices for each of their warps, `ctas` at most.
Split split_of(int rows, int K, int group_rows, int tiles, int64_t ctas) {
  Split split{};
  split.rows = rows;
  split.group_rows = group_rows;
  split.groups = static_cast<int>(ceil_div(rows, group_rows));
  split.slices = static_cast<int>(ceil_div(K, kSlice));
  const int units = split.groups * split.slices;
  ctas = std::clamp<int64_t>(ceil_div(units, 2 * kWarps / tiles), 1, std::max<int64_t>(ctas, 1));
  // As many for each row group, if that leaves few of them without work: fewer partials.
  if (ctas % split.groups <= ctas / 16) ctas -= ctas % split.groups;
  split.ctas = static_cast<int>(ctas);
  split.units_of_cta = units / split.ctas;
  split.longer_ctas = units % split.ctas;
  if (split.longer_ctas == 0 && split.slices % split.units_of_cta == 0) {
    split.slots = split.slices / split.units_of_cta;
  } else {  // a row group may begin with the last unit of one CTA and end with the first of another
    split.slots = split.slices == 1 ? 1 : (split.slices - 2) / split.units_of_cta + 2;
  }
  return split;
}

// The CTAs that the device holds at once are shared out by the bytes of the two matrices. But the adapter, which may
// fill a small part of its row group, gets no longer ranges than the weight: they would take as many round trips to
// memory.
Plan plan_of(Kind kind, DType adapter_dtype, int M, int N, int K, int R, const Device& device) {
  Plan plan{};
  plan.kind = kind;
  plan.tiles = tiles_of(kind, M);
  const int weight_rows = 16 * (kind == Kind::nf4_rows ? 2 : 1) * plan.tiles, adapter_rows = 16 * plan.tiles;
  const int64_t ctas = int64_t{device.sms} * ctas_of_sm(plan.tiles, device.smem_bytes);
  if (R > 0) {
    const double weight_bytes = N * (kind == Kind::dense ? 2.0 : 0.5);  // of an element of K
    const double adapter_bytes = R * (adapter_dtype == DType::fp32 ? 4.0 : 2.0);
    const double weight_groups = ceil_div(N, weight_rows), adapter_groups = ceil_div(R, adapter_rows);
    const double share = std::max(adapter_bytes / (adapter_bytes + weight_bytes),  //
                                  adapter_groups / (adapter_groups + weight_groups));
    plan.adapter = split_of(R, K, adapter_rows, plan.tiles, static_cast<int64_t>(std::ceil(ctas * share)));
  }
  plan.weight = split_of(N, K, weight_rows, plan.tiles, ctas - plan.adapter.ctas);
  return plan;
}

// How many floats the partials of a split are.
int64_t partials_of(const Split& split, int tiles) { return split.partial(split.slots, tiles, 0, 0); }

cudaError_t run(const LoraLinearDecodeParams& p, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  Plan plan = plan_of(kind_of(p), p.adapter_dtype, p.M, p.N, p.K, p.R, device);
  plan.weight_partials = static_cast<float*>(p.workspace);
  plan.adapter_partials = plan.weight_partials + partials_of(plan.weight, plan.tiles);
  error = multiply(p, plan, stream);
  return error == cudaSuccess ? finish(p, plan, device.major >= 9, stream) : error;
}

// The last two: slices of a matrix, and elements of x, are counted in int.
bool is_valid(int M, int N, int K, int R) {
  return M >= 0 && M <= kMaxTokens && N >= 0 && K > 0 && K % 8 == 0 && R >= 0 &&
         (int64_t{N} + R) * ceil_div(K, kSlice) <= INT32_MAX && int64_t{kMaxTokens} * K <= INT32_MAX;
}

}  // namespace
}  // namespace decode

cudaError_t lora_linear_decode(const LoraLinearDecodeParams& p, cudaStream_t stream) {
  if (!decode::is_valid(p.M, p.N, p.K, p.R) || p.dtype == DType::fp32) return cudaErrorInvalidValue;
  if (p.R > 0 && p.adapter_dtype != p.dtype && p.adapter_dtype != DType::fp32) return cudaErrorInvalidValue;
  if (p.M == 0 || p.N == 0) return cudaSuccess;  // pointers may be null
  if (!p.weight && (!is_blocksize(p.nf4.blocksize) || !is_aligned(p.nf4.packed, 4))) return cudaErrorInvalidValue;
  if (!is_aligned(p.x, 16) || !is_aligned(p.weight, 16) || !is_aligned(p.lora_a, 16) || !is_aligned(p.workspace, 16)) {
    return cudaErrorInvalidValue;
  }
  return decode::run(p, stream);
}

cudaError_t lora_linear_decode_workspace_bytes(int M, int N, int K, int R, size_t* bytes) {
  using namespace decode;
  *bytes = 0;
  if (!is_valid(M, N, K, R)) return cudaErrorInvalidValue;
  if (M == 0 || N == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  for (const Kind kind : {Kind::nf4_rows, Kind::nf4_words, Kind::dense}) {
    for (const DType adapter_dtype : {DType::bf16, DType::fp32}) {
      const Plan plan = plan_of(kind, adapter_dtype, M, N, K, R, device);
      const int64_t floats = partials_of(plan.weight, plan.tiles) + partials_of(plan.adapter, plan.tiles);
      *bytes = std::max<size_t>(*bytes, floats * sizeof(float));
    }
  }
  return cudaSuccess;
}

}  // namespace fastpeft
