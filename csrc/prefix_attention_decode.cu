// prefix_attention_decode: a few queries of each sequence over a prefix that all sequences share and over their own
// cache; two launches.
//
// Bound by memory: the keys and values, once. B = 32, Hkv = 8, D = 128 in bf16: a prefix of 4096 slots 17 MB, 5.0
// to 5.6 us at 3.35 to 3.0 TB/s (H100), and 512 own keys of each sequence 67 MB, 20 to 22 us. Without the sharing the
// prefix would be read B times, 537 MB, as a cache that begins with it is. The float32 parts that splits leave, 66 kB a
// split of all heads at 128 rows, stay in L2. All modelled.
//
// Products are mma.m16n8k16 with queries as the 16 rows. The rows that meet the same keys are those of the heads of a
// group, and for the prefix those of all sequences: B * H / Hkv * L. Up to 16 of them are one tile, whose CTA gives
// each of its four warps 16 of the 64 keys of a step, and adds up at the end. More of them are tiles of 64, 16 rows a
// warp, and each warp takes all keys. Tiles of rows beyond the first find the keys in L2. At 64 rows tensor cores need
// half of the time that memory does: 128 mma of 16 x 8 x 16 a warp for 32 kB of keys and values at D = 128.
//
// Work split: a CTA has a tile of rows, a key head and a part of the keys, `chunk`; prefix and own keys in one launch,
// as many CTAs as fill the SMs twice, each with 128 keys or more. The second kernel merges the parts of a row, in
// order. On sm_90 and later its launch overlaps the end of the first.
//
// Shared memory: the queries (64 rows: 16 kB at D = 128) and a ring of tiles of 64 keys or values, in turn, four (D <=
// 128) or two of 32 kB (D = 256), by cp.async. With three tiles of 16 kB under way and two CTAs an SM there are 96 kB
// under way; 3.35 TB/s at a latency of 0.8 us take 20.
//
// D is 64, 96, 128 or 256; pointers aligned to 16 bytes and strides multiples of 8 (cudaErrorInvalidValue otherwise).
#include <algorithm>
#include <cmath>

#include "prefix_attention_decode.cuh"
#include "ptx.cuh"

namespace fastpeft {
namespace prefix_attention {
namespace {

constexpr int kVector = 8;        // elements of 16 bits in 16 bytes
constexpr int kKeys = 64;         // of a step
constexpr int kLeastSteps = 2;    // of a split; with fewer its start and end would take most of its time
constexpr int kMostQueries = 16;  // of a sequence
constexpr float kLog2e = 1.4426950408889634f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// WARPS_M: how many warps divide the rows; the others divide the keys of a step.
template <int D, int WARPS_M>
struct Shape {
  static constexpr int rows = 16 * WARPS_M, warps_n = kWarps / WARPS_M, keys_of_warp = kKeys / warps_n;
  static constexpr int tile = kKeys * D, slots = D <= 128 ? 4 : 2;
  static constexpr int smem_bytes = 2 * (rows * D + slots * tile);
  static constexpr int sums_stride = D + 8;  // float32; lanes that store pairs of eight rows do not conflict
  static_assert(warps_n == 1 || warps_n * 16 * sums_stride * 4 <= smem_bytes, "the sums take the place of all");
};

// The element where vector `vector` of a row of D begins. Vectors are swizzled, so that eight rows that follow each
// other have vector v in eight different groups of four banks: ldmatrix and the copies do not conflict.
template <int D>
__device__ __forceinline__ int vector_at(int row, int vector) {
  constexpr int vectors = D / kVector, even = vectors & -vectors, mixed = even < 8 ? even : 8;
  return row * D + (vector ^ static_cast<unsigned>(row) / (8 / mixed) % mixed) * kVector;
}

// What a CTA does: rows first_row to first_row + rows of a key head, keys begin to end.
template <class T>
struct Work {
  const T *k, *v;
  int64_t k_stride, v_stride;  // of a key
  const uint8_t* mask;         // or null
  int head, first_row, rows, begin, end, split;
  bool is_prefix, tile_of_16;  // not of 64 rows
};

// The keys, or the slots, that a row sees: first, and the one past the last.
struct Seen {
  int first, past;
};

__device__ __forceinline__ Seen seen_by(const PrefixAttentionDecodeParams& p, bool is_prefix, int row) {
  const int at = p.T - p.L + row % p.L;
  const int first = p.window > 0 ? max(0, (is_prefix ? p.P : 0) + at + 1 - p.window) : 0;
  return {first, is_prefix ? p.P : p.causal ? at + 1 : p.T};
}

__device__ __forceinline__ float of_quad(float x, bool is_maximum) {
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float other = __shfl_xor_sync(0xffffffff, x, lanes);
    x = is_maximum ? fmaxf(x, other) : x + other;
  }
  return x;
}

// What the weights of a row are relative to, which is no infinity.
__device__ __forceinline__ float origin_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// A warp's part of an attention: 16 rows, of which a thread has rows lane / 4 and lane / 4 + 8.
template <int D>
struct State {
  float out[D / 8][4] = {};  // not divided yet, in the registers of mma
  float total[2] = {};       // sum of the weights of this thread's keys
  float largest[2] = {-INFINITY, -INFINITY};

  __device__ __forceinline__ void scale(int half, float factor) {
    total[half] *= factor;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      out[d][2 * half] *= factor;
      out[d][2 * half + 1] *= factor;
    }
  }
};

template <class T, int D, int WARPS_M>
__device__ __forceinline__ void attend(const PrefixAttentionDecodeParams& p, const Plan& plan, const Work<T>& work) {
  using S = Shape<D, WARPS_M>;
  constexpr int blocks = S::keys_of_warp / 16;  // of keys
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % WARPS_M * 16, warp_key = warp / WARPS_M * S::keys_of_warp;
  DYNAMIC_SMEM(smem);
  T* const queries = reinterpret_cast<T*>(smem);
  T* const ring = queries + S::rows * D;
  const int64_t row0 = (static_cast<int64_t>(work.split) * p.Hkv + work.head) * plan.rows + work.first_row;
  if (work.begin >= work.end) {
    const int row = static_cast<int>(threadIdx.x);
    if (row < work.rows) plan.lse[row0 + row] = -INFINITY;
    return;
  }

  const int steps = (work.end - work.begin + kKeys - 1) / kKeys;
  // Tile 2 s has the keys of step s, tile 2 s + 1 the values; zeros past the end.
  const auto fetch = [&](int tile) {
    const int key0 = work.begin + tile / 2 * kKeys;
    const T* const from = tile % 2 == 0 ? work.k : work.v;
    const int64_t stride = tile % 2 == 0 ? work.k_stride : work.v_stride;
    T* const to = ring + tile % S::slots * S::tile;
#pragma unroll 8
    for (int n = 0; n < S::tile / kVector / kThreads; ++n) {  // known when compiled: no remainder
      const int i = static_cast<int>(threadIdx.x) + n * kThreads;
      const int key = i / (D / kVector), vector = i % (D / kVector);
      const bool valid = key0 + key < work.end;
      cp_async_16(to + vector_at<D>(key, vector), from + (valid ? key0 + key : 0) * stride + vector * kVector, valid);
    }
  };
  // Waits for a tile, and gives the slot of the one before it to the tile that comes slots - 1 later.
  const auto arrive = [&](int tile) {
    cp_async_wait<S::slots - 2>();
    __syncthreads();
    if (tile + S::slots - 1 < 2 * steps) fetch(tile + S::slots - 1);
    cp_async_commit();
    return ring + tile % S::slots * S::tile;
  };

  const int group = p.H / p.Hkv;
#pragma unroll 4
  for (int i = threadIdx.x; i < S::rows * (D / kVector); i += kThreads) {
    const int row = i / (D / kVector), vector = i % (D / kVector);
    const bool valid = row < work.rows;
    const int of_head = work.first_row + (valid ? row : 0), head = of_head / p.L;
    const T* const from = static_cast<const T*>(p.q) + head / group * p.q_stride.sequence +
                          (work.head * group + head % group) * p.q_stride.head + of_head % p.L * p.q_stride.row;
    cp_async_16(queries + vector_at<D>(row, vector), from + vector * kVector, valid);
  }
#pragma unroll
  for (int tile = 0; tile < S::slots - 1; ++tile) {
    if (tile < 2 * steps) fetch(tile);
    cp_async_commit();
  }

  Seen seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    seen[half] = row < work.rows ? seen_by(p, work.is_prefix, work.first_row + row) : Seen{0, 0};
    seen[half].past = min(seen[half].past, work.end);
  }
  const float cap = p.softcap * kLog2e, scale = cap > 0.0f ? p.scale / p.softcap : p.scale * kLog2e;

  State<D> state;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const T* const keys = arrive(2 * step);
    float s[2 * blocks][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t q[4], k[4];
      ldmatrix_x4(q, queries + vector_at<D>(warp_row + lane % 16, d / kVector + lane / 16));
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        const int key = warp_key + 16 * j + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(k, keys + vector_at<D>(key, d / kVector + lane / 8 % 2));
        mma_m16n8k16<T>(s[2 * j], q, {k[0], k[1]});
        mma_m16n8k16<T>(s[2 * j + 1], q, {k[2], k[3]});
      }
    }

    // log2(e) times the scores. Branches stand around the loops, the same for all lanes: one for each score would take
    // most of the time.
    const int key0 = work.begin + step * kKeys + warp_key + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8 * blocks; ++i) s[i / 4][i % 4] *= scale;
    if (cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < 8 * blocks; ++i) s[i / 4][i % 4] = cap * tanhf(s[i / 4][i % 4]);
    }
    if (work.mask) {
#pragma unroll
      for (int i = 0; i < 4 * blocks; ++i) {
        const int key = min(key0 + i / 2 * 8 + i % 2, work.end - 1);  // the others are past what any row sees
        if (__ldg(work.mask + key) == 0) s[i / 2][i % 2] = s[i / 2][2 + i % 2] = -INFINITY;
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = state.largest[half];
#pragma unroll
      for (int i = 0; i < 4 * blocks; ++i) {
        float& x = s[i / 2][2 * half + i % 2];
        const int key = key0 + i / 2 * 8 + i % 2;
        x = key >= seen[half].first && key < seen[half].past ? x : -INFINITY;
        largest = fmaxf(largest, x);
      }
      largest = of_quad(largest, true);
      const float origin = origin_of(largest);
      state.scale(half, exp2f(state.largest[half] - origin));
      state.largest[half] = largest;
#pragma unroll
      for (int i = 0; i < 4 * blocks; ++i) {
        float& x = s[i / 2][2 * half + i % 2];
        x = exp2f(x - origin);
        state.total[half] += x;
      }
    }

    const T* const values = arrive(2 * step + 1);
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
      uint32_t weights[4];  // what mma left is what it takes: two tiles of 16 x 8 are one of 16 x 16
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto pair = Rounded<T>::two(s[2 * j + i / 2][i % 2 * 2], s[2 * j + i / 2][i % 2 * 2 + 1]);
        weights[i] = reinterpret_cast<const uint32_t&>(pair);
      }
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, values + vector_at<D>(warp_key + 16 * j + lane % 16, d / kVector + lane / 16));
        mma_m16n8k16<T>(state.out[d / 8], weights, {v[0], v[1]});
        mma_m16n8k16<T>(state.out[d / 8 + 1], weights, {v[2], v[3]});
      }
    }
  }

  start_dependents();
  if constexpr (S::warps_n == 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + half * 8 + lane / 4;
      const float total = of_quad(state.total[half], false);
      if (row >= work.rows) continue;
      if (lane % 4 == 0) plan.lse[row0 + row] = total > 0.0f ? state.largest[half] + log2f(total) : -INFINITY;
      if (total == 0.0f) continue;
      float* const to = plan.out + (row0 + row) * D + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const float2 pair = make_float2(state.out[d][2 * half] / total, state.out[d][2 * half + 1] / total);
        *reinterpret_cast<float2*>(to + d * 8) = pair;
      }
    }
  } else {  // the warps have the same rows: their parts are added up where queries and ring were
    __shared__ float shared_largest[S::warps_n][16], shared_total[S::warps_n][16];
    float* const sums = reinterpret_cast<float*>(smem);  // [warps_n][16][sums_stride]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      if (lane % 4 == 0) shared_largest[warp][row] = state.largest[half];
    }
    __syncthreads();  // all have done with the ring, too
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      float largest = shared_largest[0][row];
#pragma unroll
      for (int w = 1; w < S::warps_n; ++w) largest = fmaxf(largest, shared_largest[w][row]);
      state.scale(half, exp2f(state.largest[half] - origin_of(largest)));
      const float total = of_quad(state.total[half], false);
      if (lane % 4 == 0) shared_total[warp][row] = total;
      float* const to = sums + (warp * 16 + row) * S::sums_stride + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        *reinterpret_cast<float2*>(to + d * 8) = make_float2(state.out[d][2 * half], state.out[d][2 * half + 1]);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < work.rows * (D / 4); i += kThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      float total = 0.0f, largest = -INFINITY;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int w = 0; w < S::warps_n; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(sums + (w * 16 + row) * S::sums_stride + column);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        total += shared_total[w][row];
        largest = fmaxf(largest, shared_largest[w][row]);
      }
      if (column == 0) plan.lse[row0 + row] = total > 0.0f ? largest + log2f(total) : -INFINITY;
      if (total == 0.0f) continue;
      const float4 out = make_float4(sum.x / total, sum.y / total, sum.z / total, sum.w / total);
      *reinterpret_cast<float4*>(plan.out + (row0 + row) * D + column) = out;
    }
  }
}

// The part of the work that this CTA has.
template <class T, int D>
__device__ __forceinline__ Work<T> work_of(const PrefixAttentionDecodeParams& p, const Plan& plan) {
  const int rows_of_sequence = p.H / p.Hkv * p.L, ctas_of_prefix = plan.prefix.ctas(p.Hkv);
  Work<T> work{};
  work.is_prefix = static_cast<int>(blockIdx.x) < ctas_of_prefix;
  Part part = plan.own;  // a copy: a reference to one of two would bring the parameters into local memory
  if (work.is_prefix) part = plan.prefix;
  work.tile_of_16 = part.tile_rows == 16;
  int cta = static_cast<int>(blockIdx.x) - (work.is_prefix ? 0 : ctas_of_prefix);
  const int tile = cta % part.row_tiles;  // neighbours read the same keys
  cta /= part.row_tiles;
  work.head = cta % p.Hkv;
  cta /= p.Hkv;
  const int sequence = cta % part.row_sets, split = cta / part.row_sets;

  const int rows = work.is_prefix ? plan.rows : rows_of_sequence, row = tile * part.tile_rows;
  work.first_row = sequence * rows_of_sequence + row;
  work.rows = min(part.tile_rows, rows - row);
  work.split = split + (work.is_prefix ? 0 : plan.prefix.splits);
  const int64_t head = work.head;
  if (work.is_prefix) {
    work.k = static_cast<const T*>(p.prefix_k) + head * p.P * D;
    work.v = static_cast<const T*>(p.prefix_v) + head * p.P * D;
    work.k_stride = work.v_stride = D;
  } else {
    work.k = static_cast<const T*>(p.k) + sequence * p.k_stride.sequence + head * p.k_stride.head;
    work.v = static_cast<const T*>(p.v) + sequence * p.v_stride.sequence + head * p.v_stride.head;
    work.k_stride = p.k_stride.row;
    work.v_stride = p.v_stride.row;
    if (p.mask) work.mask = p.mask + static_cast<int64_t>(sequence) * p.T;
  }

  // Of its split what the first query sees: the others see no earlier key.
  work.begin = max(split * part.chunk, seen_by(p, work.is_prefix, 0).first);
  work.end = min((split + 1) * part.chunk, work.is_prefix ? p.P : p.T);
  return work;
}

// Two CTAs an SM, as the plan has them: with the fewer registers of three or four some architectures spill.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_decode_kernel(PrefixAttentionDecodeParams p, Plan plan) {
  const Work<T> work = work_of<T, D>(p, plan);
  if (work.tile_of_16) {
    attend<T, D, 1>(p, plan, work);
  } else {
    attend<T, D, 4>(p, plan, work);
  }
}

struct Device {
  int sms, major;
};

cudaError_t current_device(Device& device) {
  int ordinal;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, ordinal);
  return error;
}

Part part_of(int rows, int row_sets) {
  Part part{};
  part.tile_rows = rows <= 16 ? 16 : 64;
  part.row_tiles = static_cast<int>(ceil_div(rows, part.tile_rows));
  part.row_sets = row_sets;
  return part;
}

// Cuts `size` keys into parts of about `steps` steps, all as long.
void cut(Part& part, int size, int64_t steps) {
  const int64_t all = ceil_div(size, kKeys), splits = ceil_div(all, steps);
  part.chunk = static_cast<int>(splits > 0 ? ceil_div(all, splits) : 1) * kKeys;
  part.splits = static_cast<int>(ceil_div(size, part.chunk));
}

Plan plan_of(int B, int H, int Hkv, int L, int T, int P, int sms) {
  Plan plan{};
  const int rows_of_sequence = H / Hkv * L;
  plan.rows = B * rows_of_sequence;
  plan.prefix = part_of(plan.rows, 1);
  plan.own = part_of(rows_of_sequence, B);
  const int64_t steps_of_prefix = plan.prefix.ctas_of_split(Hkv) * ceil_div(P, kKeys);
  const int64_t steps_of_own = plan.own.ctas_of_split(Hkv) * ceil_div(T, kKeys);
  const int64_t steps = std::max<int64_t>(ceil_div(steps_of_prefix + steps_of_own, 2 * sms), kLeastSteps);
  cut(plan.prefix, P, steps);
  cut(plan.own, T, steps);
  return plan;
}

size_t workspace_bytes(const Plan& plan, int Hkv, int D) {
  return size_t{sizeof(float)} * plan.splits() * Hkv * plan.rows * (D + 1);
}

template <class T, int D>
cudaError_t launch_attend(const PrefixAttentionDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  const int64_t ctas = plan.prefix.ctas(p.Hkv) + plan.own.ctas(p.Hkv);
  if (ctas == 0) return cudaSuccess;
  const bool small = plan.prefix.tile_rows == 16 && plan.own.tile_rows == 16;
  const size_t smem_bytes = small ? Shape<D, 1>::smem_bytes : Shape<D, 4>::smem_bytes;
  return launch(prefix_attention_decode_kernel<T, D>, dim3(static_cast<unsigned>(ctas)), dim3(kThreads), smem_bytes,
                stream, p, plan);
}

template <class T>
cudaError_t attend_by_head_size(const PrefixAttentionDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  switch (p.D) {
    case 64:
      return launch_attend<T, 64>(p, plan, stream);
    case 96:
      return launch_attend<T, 96>(p, plan, stream);
    case 128:
      return launch_attend<T, 128>(p, plan, stream);
    default:
      return launch_attend<T, 256>(p, plan, stream);
  }
}

// The last: rows of a key head, and CTAs, are counted in int.
bool is_valid(int B, int H, int Hkv, int L, int T, int P, int D) {
  return B >= 0 && Hkv > 0 && H > 0 && H % Hkv == 0 && L >= 0 && L <= kMostQueries && T >= 0 && P >= 0 &&
         (D == 64 || D == 96 || D == 128 || D == 256) &&
         int64_t{B} * H * L * (ceil_div(P, kKeys) + ceil_div(T, kKeys)) <= INT32_MAX;
}

bool is_aligned_to_vectors(const void* pointer, const HeadStrides& stride) {
  return is_aligned(pointer, 16) && stride.sequence % kVector == 0 && stride.head % kVector == 0 &&
         stride.row % kVector == 0;
}

}  // namespace
}  // namespace prefix_attention

cudaError_t prefix_attention_decode(const PrefixAttentionDecodeParams& p, cudaStream_t stream) {
  using namespace prefix_attention;
  if (!is_valid(p.B, p.H, p.Hkv, p.L, p.T, p.P, p.D) || p.dtype == DType::fp32) return cudaErrorInvalidValue;
  if (!is_aligned_to_vectors(p.q, p.q_stride) || !is_aligned_to_vectors(p.k, p.k_stride) ||
      !is_aligned_to_vectors(p.v, p.v_stride) || !is_aligned(p.prefix_k, 16) || !is_aligned(p.prefix_v, 16) ||
      !is_aligned(p.out, 8) || !is_aligned(p.workspace, 16)) {
    return cudaErrorInvalidValue;
  }
  if (p.B == 0 || p.L == 0) return cudaSuccess;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  Plan plan = plan_of(p.B, p.H, p.Hkv, p.L, p.T, p.P, device.sms);
  plan.out = static_cast<float*>(p.workspace);
  plan.lse = plan.out + static_cast<int64_t>(plan.splits()) * p.Hkv * plan.rows * p.D;
  error = p.dtype == DType::bf16 ? attend_by_head_size<__nv_bfloat16>(p, plan, stream)
                                 : attend_by_head_size<__half>(p, plan, stream);
  return error == cudaSuccess ? finish(p, plan, device.major >= 9, stream) : error;
}

cudaError_t prefix_attention_decode_workspace_bytes(int B, int H, int Hkv, int L, int T, int P, int D, size_t* bytes) {
  using namespace prefix_attention;
  *bytes = 0;
  if (!is_valid(B, H, Hkv, L, T, P, D)) return cudaErrorInvalidValue;
  if (B == 0 || L == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  *bytes = workspace_bytes(plan_of(B, H, Hkv, L, T, P, device.sms), Hkv, D);
  return cudaSuccess;
}

}  // namespace fastpeft
