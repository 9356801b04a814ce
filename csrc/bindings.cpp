// fastpeft._cuda: the functions of ops.h for Python. Addresses (tensor.data_ptr()) and a stream (its cuda_stream) come
// as integers, so the module links neither torch nor the driver and imports on any machine.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;
using namespace py::literals;
using namespace fastpeft;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastpeft. Arguments are addresses and sizes, unchecked: use fastpeft.ops.";

  // What the addresses belong to.
#if defined(CUDA_EMULATION)
  m.attr("device_type") = "cpu";
#else
  m.attr("device_type") = "cuda";
#endif

  // module_local: a process may hold several builds of this module, the emulated ones beside the real one.
  py::enum_<DType>(m, "DType", py::module_local())
      .value("bf16", DType::bf16)
      .value("fp16", DType::fp16)
      .value("fp32", DType::fp32);

  // Addresses only: it keeps no tensor alive, so make one for each call.
  py::class_<Nf4Storage>(m, "Nf4Storage", py::module_local())
      .def_static(
          "plain",
          [](Address packed, Address absmax, int blocksize) {
            Nf4Storage w{};
            w.packed = pointer<const uint8_t>(packed);
            w.absmax = pointer<const float>(absmax);
            w.blocksize = blocksize;
            return w;
          },
          "packed"_a, "absmax"_a, "blocksize"_a)
      .def_static(
          "nested",
          [](Address packed, Address absmax_u8, Address absmax_code, Address absmax2, Address absmax_offset,
             int blocksize) {
            Nf4Storage w{};
            w.packed = pointer<const uint8_t>(packed);
            w.absmax_u8 = pointer<const uint8_t>(absmax_u8);
            w.absmax_code = pointer<const float>(absmax_code);
            w.absmax2 = pointer<const float>(absmax2);
            w.absmax_offset = pointer<const float>(absmax_offset);
            w.blocksize = blocksize;
            return w;
          },
          "packed"_a, "absmax_u8"_a, "absmax_code"_a, "absmax2"_a, "absmax_offset"_a, "blocksize"_a);

  m.def(
      "nf4_dequantize",
      [](const Nf4Storage& weight, Address out, DType out_dtype, int64_t numel, Address stream) {
        check("nf4_dequantize", nf4_dequantize({weight, pointer<void>(out), out_dtype, numel}, stream_of(stream)));
      },
      "weight"_a, "out"_a, "out_dtype"_a, "numel"_a, "stream"_a);

  m.def(
      "nf4_quantize",
      [](Address weight, DType weight_dtype, Address packed, Address absmax, int64_t numel, int blocksize,
         Address stream) {
        check("nf4_quantize", nf4_quantize({pointer<const void>(weight), weight_dtype, pointer<uint8_t>(packed),
                                            pointer<float>(absmax), numel, blocksize},
                                           stream_of(stream)));
      },
      "weight"_a, "weight_dtype"_a, "packed"_a, "absmax"_a, "numel"_a, "blocksize"_a, "stream"_a);

  m.def(
      "nf4_quantize_absmax",
      [](Address absmax, Address offset, Address absmax_code, Address absmax_u8, Address absmax2, int64_t blocks,
         Address stream) {
        check("nf4_quantize_absmax", nf4_quantize_absmax({pointer<const float>(absmax), pointer<const float>(offset),
                                                          pointer<const float>(absmax_code),
                                                          pointer<uint8_t>(absmax_u8), pointer<float>(absmax2), blocks},
                                                         stream_of(stream)));
      },
      "absmax"_a, "offset"_a, "absmax_code"_a, "absmax_u8"_a, "absmax2"_a, "blocks"_a, "stream"_a);

  m.def(
      "nf4_merge",
      [](const Nf4Storage& weight, Address lora_a, Address lora_b, float scaling, Address scaling_tensor, Address gain,
         Address out, DType dtype, int N, int K, int R, Address stream) {
        check("nf4_merge", nf4_merge({weight, pointer<const void>(lora_a), pointer<const void>(lora_b), scaling,
                                      pointer<const float>(scaling_tensor), pointer<const float>(gain),
                                      pointer<void>(out), dtype, N, K, R},
                                     stream_of(stream)));
      },
      "weight"_a, "lora_a"_a, "lora_b"_a, "scaling"_a, "scaling_tensor"_a, "gain"_a, "out"_a, "dtype"_a, "N"_a, "K"_a,
      "R"_a, "stream"_a);

  m.def(
      "lora_linear_decode",
      [](Address x, Address weight, const Nf4Storage* nf4, Address lora_a, Address lora_b, DType adapter_dtype,
         float scaling, Address scaling_tensor, Address gain, Address bias, Address y, Address workspace, DType dtype,
         int M, int N, int K, int R, Address stream) {
        const LoraLinearDecodeParams p{pointer<const void>(x),
                                       pointer<const void>(weight),
                                       nf4 ? *nf4 : Nf4Storage{},
                                       pointer<const void>(lora_a),
                                       pointer<const void>(lora_b),
                                       adapter_dtype,
                                       scaling,
                                       pointer<const float>(scaling_tensor),
                                       pointer<const float>(gain),
                                       pointer<const void>(bias),
                                       pointer<void>(y),
                                       pointer<void>(workspace),
                                       dtype,
                                       M,
                                       N,
                                       K,
                                       R};
        check("lora_linear_decode", lora_linear_decode(p, stream_of(stream)));
      },
      "x"_a, "weight"_a, "nf4"_a.none(true), "lora_a"_a, "lora_b"_a, "adapter_dtype"_a, "scaling"_a, "scaling_tensor"_a,
      "gain"_a, "bias"_a, "y"_a, "workspace"_a, "dtype"_a, "M"_a, "N"_a, "K"_a, "R"_a, "stream"_a);

  m.def(
      "lora_linear_decode_workspace_bytes",
      [](int M, int N, int K, int R) {
        size_t bytes = 0;
        check("lora_linear_decode_workspace_bytes", lora_linear_decode_workspace_bytes(M, N, K, R, &bytes));
        return bytes;
      },
      "M"_a, "N"_a, "K"_a, "R"_a);

  m.def(
      "lora_down",
      [](Address x, Address lora_a, DType adapter_dtype, Address xa, Address seed, double dropout_p, DType dtype, int M,
         int K, int R, Address workspace, Address stream) {
        check("lora_down",
              lora_down({pointer<const void>(x), pointer<const void>(lora_a), adapter_dtype, pointer<void>(xa),
                         pointer<const int64_t>(seed), dropout_p, dtype, M, K, R, pointer<void>(workspace)},
                        stream_of(stream)));
      },
      "x"_a, "lora_a"_a, "adapter_dtype"_a, "xa"_a, "seed"_a, "dropout_p"_a, "dtype"_a, "M"_a, "K"_a, "R"_a,
      "workspace"_a, "stream"_a);
  m.def("lora_down_workspace_bytes", &lora_down_workspace_bytes, "M"_a, "K"_a, "R"_a);

  m.def(
      "lora_up_grad",
      [](Address dy, Address lora_b, DType adapter_dtype, Address xa, Address u, Address d_b, float scale, DType dtype,
         int M, int N, int R, Address workspace, Address stream) {
        check("lora_up_grad", lora_up_grad({pointer<const void>(dy), pointer<const void>(lora_b), adapter_dtype,
                                            pointer<const void>(xa), pointer<void>(u), pointer<void>(d_b), scale, dtype,
                                            M, N, R, pointer<void>(workspace)},
                                           stream_of(stream)));
      },
      "dy"_a, "lora_b"_a, "adapter_dtype"_a, "xa"_a, "u"_a, "d_b"_a, "scale"_a, "dtype"_a, "M"_a, "N"_a, "R"_a,
      "workspace"_a, "stream"_a);
  m.def("lora_up_grad_workspace_bytes", &lora_up_grad_workspace_bytes, "M"_a, "N"_a, "R"_a);

  m.def(
      "lora_down_grad",
      [](Address x, Address u, Address d_a, DType adapter_dtype, float scale, Address seed, double dropout_p,
         DType dtype, int M, int K, int R, Address workspace, Address stream) {
        check("lora_down_grad",
              lora_down_grad({pointer<const void>(x), pointer<const void>(u), pointer<void>(d_a), adapter_dtype, scale,
                              pointer<const int64_t>(seed), dropout_p, dtype, M, K, R, pointer<void>(workspace)},
                             stream_of(stream)));
      },
      "x"_a, "u"_a, "d_a"_a, "adapter_dtype"_a, "scale"_a, "seed"_a, "dropout_p"_a, "dtype"_a, "M"_a, "K"_a, "R"_a,
      "workspace"_a, "stream"_a);
  m.def("lora_down_grad_workspace_bytes", &lora_down_grad_workspace_bytes, "M"_a, "K"_a, "R"_a);

  m.def(
      "lora_add",
      [](Address y, Address xa, Address lora_b, DType adapter_dtype, bool transposed, float scale, Address seed,
         double dropout_p, Address gain, Address bias, Address out, DType dtype, int M, int N, int R, Address stream) {
        check("lora_add",
              lora_add({pointer<void>(y), pointer<const void>(xa), pointer<const void>(lora_b), adapter_dtype,
                        transposed, scale, pointer<const int64_t>(seed), dropout_p, pointer<const float>(gain),
                        pointer<const void>(bias), pointer<void>(out), dtype, M, N, R},
                       stream_of(stream)));
      },
      "y"_a, "xa"_a, "lora_b"_a, "adapter_dtype"_a, "transposed"_a, "scale"_a, "seed"_a, "dropout_p"_a, "gain"_a = 0,
      "bias"_a = 0, "out"_a = 0, "dtype"_a, "M"_a, "N"_a, "R"_a, "stream"_a);

  m.def(
      "dora_norm",
      [](Address weight, const Nf4Storage* nf4, Address lora_a, Address lora_b, DType adapter_dtype, float scaling,
         Address scaling_tensor, Address norm, Address workspace, DType dtype, int N, int K, int R, Address stream) {
        check("dora_norm",
              dora_norm({pointer<const void>(weight), nf4 ? *nf4 : Nf4Storage{}, pointer<const void>(lora_a),
                         pointer<const void>(lora_b), adapter_dtype, scaling, pointer<const float>(scaling_tensor),
                         pointer<float>(norm), pointer<void>(workspace), dtype, N, K, R},
                        stream_of(stream)));
      },
      "weight"_a, "nf4"_a.none(true), "lora_a"_a, "lora_b"_a, "adapter_dtype"_a, "scaling"_a, "scaling_tensor"_a,
      "norm"_a, "workspace"_a, "dtype"_a, "N"_a, "K"_a, "R"_a, "stream"_a);
  m.def("dora_norm_workspace_bytes", &dora_norm_workspace_bytes, "N"_a, "K"_a, "R"_a);

  m.def(
      "dora_linear_add",
      [](Address x, Address gain, Address offset, Address out, Address seed, double dropout_p, DType dtype, int M,
         int N, Address stream) {
        check("dora_linear_add",
              dora_linear_add({pointer<const void>(x), pointer<const float>(gain), pointer<const void>(offset),
                               pointer<void>(out), pointer<const int64_t>(seed), dropout_p, dtype, M, N},
                              stream_of(stream)));
      },
      "x"_a, "gain"_a, "offset"_a, "out"_a, "seed"_a, "dropout_p"_a, "dtype"_a, "M"_a, "N"_a, "stream"_a);

  m.def(
      "dora_linear_gain_grad",
      [](Address dy, Address z, Address d_gain, DType dtype, int M, int N, Address workspace, Address stream) {
        check("dora_linear_gain_grad",
              dora_linear_gain_grad({pointer<const void>(dy), pointer<const void>(z), pointer<float>(d_gain), dtype, M,
                                     N, pointer<void>(workspace)},
                                    stream_of(stream)));
      },
      "dy"_a, "z"_a, "d_gain"_a, "dtype"_a, "M"_a, "N"_a, "workspace"_a, "stream"_a);
  m.def("dora_linear_gain_grad_workspace_bytes", &dora_linear_gain_grad_workspace_bytes, "M"_a, "N"_a);

  // The two below answer on a machine without a driver too: an error is part of the answer.
  m.def(
      "device_count",
      [] {
        int count = 0;
        const cudaError_t error = cudaGetDeviceCount(&count);
        return py::make_tuple(error == cudaSuccess ? count : 0, static_cast<int>(error), cudaGetErrorName(error));
      },
      "(GPUs this module can use, cudaError_t, its name); (0, 35, 'cudaErrorInsufficientDriver') without a driver.");

  m.def(
      "versions",
      [] {
        int runtime = 0, driver = 0;
        cudaRuntimeGetVersion(&runtime);
        cudaDriverGetVersion(&driver);
        return py::dict("runtime"_a = runtime, "driver"_a = driver, "archs"_a = FASTPEFT_CUDA_ARCHS);
      },
      "CUDA versions as 1000 * major + 10 * minor (driver: 0 if there is none) and the architectures compiled for.");
}
