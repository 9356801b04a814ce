#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "planted.h"

using planted::Pair;

namespace {

planted::Table all() {
  planted::Table table;
  for (const auto* part : {&planted::kSynchronization, &planted::kMemory, &planted::kCopies, &planted::kGrids}) {
    table.insert(part->begin(), part->end());
  }
  return table;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("names", [] {
    std::vector<std::string> names;
    for (const auto& entry : all()) names.push_back(entry.first);
    return names;
  });
  m.def("run", [](const std::string& name, bool buggy, uintptr_t in, uintptr_t out, unsigned n) {
    const Pair pair = all().at(name);
    const planted::Launch launch = buggy ? pair.buggy_launch : pair.launch;
    const planted::Kernel kernel = buggy ? pair.buggy : pair.healthy;
    cudaError_t error = cudaSuccess;
    for (int i = 0; i <= launch.twice && error == cudaSuccess; ++i) {
      error = fastpeft::launch_dependent(kernel, i > 0, dim3(launch.blocks), dim3(launch.threads), launch.smem_bytes,
                                         nullptr, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), n);
    }
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
  });
}
