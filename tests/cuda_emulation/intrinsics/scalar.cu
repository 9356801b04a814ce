// Functions of one thread: bits in, bits out; test_intrinsics.py has the same names in numpy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>

#include "kernels.h"
#include "run.h"

namespace {

// An operation is a lambda without captures, so its type says all.
template <class Operation>
__global__ void scalar_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = Operation{}(a[i], b[i], c[i]);
}

using Run = void (*)(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n);

template <class Operation>
Run on_bits(Operation) {
  return [](const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
    run(scalar_kernel<Operation>, dim3((n + 63) / 64), dim3(64), 0, a, b, c, out, n);
  };
}

// The lower bits of each argument are one T: a float, a half, a pair of halves.
template <class T, class Operation>
Run on(Operation) {
  return on_bits([](uint32_t a, uint32_t b, uint32_t c) {
    const T result = Operation{}(emulation::from_bits<T>(a), emulation::from_bits<T>(b), emulation::from_bits<T>(c));
    return static_cast<uint32_t>(emulation::to_bits(result));
  });
}

const std::map<std::string, Run> kOperations = {
    {"popc", on_bits([](uint32_t a, uint32_t, uint32_t) { return __popc(a); })},
    {"popcll", on_bits([](uint32_t a, uint32_t b, uint32_t) { return __popcll(uint64_t{a} << 32 | b); })},
    {"clz", on_bits([](uint32_t a, uint32_t, uint32_t) { return __clz(static_cast<int>(a)); })},
    {"clzll", on_bits([](uint32_t a, uint32_t b, uint32_t) { return __clzll(int64_t(uint64_t{a} << 32 | b)); })},
    {"ffs", on_bits([](uint32_t a, uint32_t, uint32_t) { return __ffs(static_cast<int>(a)); })},
    {"ffsll", on_bits([](uint32_t a, uint32_t b, uint32_t) { return __ffsll(int64_t(uint64_t{a} << 32 | b)); })},
    {"brev", on_bits([](uint32_t a, uint32_t, uint32_t) { return __brev(a); })},
    {"byte_perm", on_bits([](uint32_t a, uint32_t b, uint32_t c) { return __byte_perm(a, b, c); })},
    {"funnelshift_l", on_bits([](uint32_t a, uint32_t b, uint32_t c) { return __funnelshift_l(a, b, c); })},
    {"funnelshift_r", on_bits([](uint32_t a, uint32_t b, uint32_t c) { return __funnelshift_r(a, b, c); })},
    {"funnelshift_lc", on_bits([](uint32_t a, uint32_t b, uint32_t c) { return __funnelshift_lc(a, b, c % 64); })},
    {"funnelshift_rc", on_bits([](uint32_t a, uint32_t b, uint32_t c) { return __funnelshift_rc(a, b, c % 64); })},
    {"umulhi", on_bits([](uint32_t a, uint32_t b, uint32_t) { return __umulhi(a, b); })},
    {"mulhi", on_bits([](uint32_t a, uint32_t b, uint32_t) { return uint32_t(__mulhi(int(a), int(b))); })},
    {"dp4a", on_bits([](uint32_t a, uint32_t b, uint32_t c) { return uint32_t(__dp4a(int(a), int(b), int(c >> 8))); })},
    {"min_unsigned", on_bits([](uint32_t a, uint32_t b, uint32_t) { return min(a, b); })},
    {"max_int", on_bits([](uint32_t a, uint32_t b, uint32_t) { return uint32_t(max(int(a), int(b))); })},
    {"float2int_rn",
     on_bits([](uint32_t a, uint32_t, uint32_t) { return uint32_t(__float2int_rn(__uint_as_float(a))); })},
    {"float2int_rz",
     on_bits([](uint32_t a, uint32_t, uint32_t) { return uint32_t(__float2int_rz(__uint_as_float(a))); })},
    {"float2int_rd",
     on_bits([](uint32_t a, uint32_t, uint32_t) { return uint32_t(__float2int_rd(__uint_as_float(a))); })},
    {"float2int_ru",
     on_bits([](uint32_t a, uint32_t, uint32_t) { return uint32_t(__float2int_ru(__uint_as_float(a))); })},
    {"float2uint_rn", on_bits([](uint32_t a, uint32_t, uint32_t) { return __float2uint_rn(__uint_as_float(a)); })},
    {"float2uint_rz", on_bits([](uint32_t a, uint32_t, uint32_t) { return __float2uint_rz(__uint_as_float(a)); })},
    {"int2float_rn", on_bits([](uint32_t a, uint32_t, uint32_t) { return __float_as_uint(__int2float_rn(int(a))); })},
    {"uint2float_rn", on_bits([](uint32_t a, uint32_t, uint32_t) { return __float_as_uint(__uint2float_rn(a)); })},
    {"int_as_float",
     on_bits([](uint32_t a, uint32_t, uint32_t) { return uint32_t(__float_as_int(__int_as_float(int(a)))); })},
    {"ldg", on_bits([](uint32_t a, uint32_t, uint32_t) { return __ldg(&a); })},
    {"ldcs_stcs", on_bits([](uint32_t a, uint32_t, uint32_t) {
       uint32_t to;
       __stcs(&to, __ldcs(&a));
       return to;
     })},
    {"fadd_rn", on<float>([](float a, float b, float) { return __fadd_rn(a, b); })},
    {"fsub_rn", on<float>([](float a, float b, float) { return __fsub_rn(a, b); })},
    {"fmul_rn", on<float>([](float a, float b, float) { return __fmul_rn(a, b); })},
    {"fdiv_rn", on<float>([](float a, float b, float) { return __fdiv_rn(a, b); })},
    {"fdividef", on<float>([](float a, float b, float) { return __fdividef(a, b); })},
    {"frcp_rn", on<float>([](float a, float, float) { return __frcp_rn(a); })},
    {"fsqrt_rn", on<float>([](float a, float, float) { return __fsqrt_rn(a); })},
    {"fmaf_rn", on<float>([](float a, float b, float c) { return __fmaf_rn(a, b, c); })},
    {"multiply_then_add", on<float>([](float a, float b, float c) { return a * b + c; })},
    {"saturatef", on<float>([](float a, float, float) { return __saturatef(a); })},
    {"min_float", on<float>([](float a, float b, float) { return min(a, b); })},
    {"max_float", on<float>([](float a, float b, float) { return max(a, b); })},
    {"rsqrtf", on<float>([](float a, float, float) { return rsqrtf(a); })},
    {"expf", on<float>([](float a, float, float) { return __expf(a); })},
    {"exp10f", on<float>([](float a, float, float) { return __exp10f(a); })},
    {"logf", on<float>([](float a, float, float) { return __logf(a); })},
    {"log2f", on<float>([](float a, float, float) { return __log2f(a); })},
    {"powf", on<float>([](float a, float b, float) { return __powf(a, b); })},
    {"hfma_half", on<__half>([](__half a, __half b, __half c) { return __hfma(a, b, c); })},
    {"hfma_bfloat16",
     on<__nv_bfloat16>([](__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return __hfma(a, b, c); })},
    {"hfma2_half", on<__half2>([](__half2 a, __half2 b, __half2 c) { return __hfma2(a, b, c); })},
    {"hfma2_bfloat16",
     on<__nv_bfloat162>([](__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return __hfma2(a, b, c); })},
};

}  // namespace

std::vector<std::string> scalar_operations() { return names_of(kOperations); }
void scalar_operation(const std::string& name, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out,
                      int n) {
  kOperations.at(name)(a, b, c, out, n);
}
