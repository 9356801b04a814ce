#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cuda, m) {
  m.def("warp_operations", warp_operations);
  m.def("warp_operation", [](const std::string& name, Address in, Address out, int threads) {
    warp_operation(name, pointer<int>(in), pointer<int>(out), threads);
  });
  m.def("shuffle_type", [](const std::string& type, Address in, Address out, int threads) {
    shuffle_type(type, pointer<void>(in), pointer<void>(out), threads);
  });
  m.def("scalar_operations", scalar_operations);
  m.def("scalar_operation", [](const std::string& name, Address a, Address b, Address c, Address out, int n) {
    scalar_operation(name, pointer<uint32_t>(a), pointer<uint32_t>(b), pointer<uint32_t>(c), pointer<uint32_t>(out), n);
  });
  m.def("atomic_operations", atomic_operations);
  m.def("atomic_operation", [](const std::string& name, Address in, Address old, Address total, int threads) {
    atomic_operation(name, pointer<unsigned>(in), pointer<unsigned>(old), pointer<unsigned>(total), threads);
  });
  m.def("atomic_add", [](const std::string& type, Address in, Address total, int threads) {
    atomic_add(type, pointer<void>(in), pointer<void>(total), threads);
  });
  m.def("indices", [](std::array<unsigned, 3> grid, std::array<unsigned, 3> block, Address out) {
    indices(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), pointer<unsigned>(out));
  });
  m.def("mma", [](bool bf16, Address a, Address b, Address d) {
    mma(bf16, pointer<uint32_t>(a), pointer<uint32_t>(b), pointer<float>(d));
  });
  m.def("load_matrices", [](int matrices, bool transposed, Address rows, int stride_bytes, Address out) {
    load_matrices(matrices, transposed, pointer<uint16_t>(rows), stride_bytes, pointer<uint32_t>(out));
  });
  m.def("multiply", [](Address a, Address b, Address out) {
    multiply(pointer<uint16_t>(a), pointer<uint16_t>(b), pointer<float>(out));
  });
  m.def("copy_groups", [](int bytes, int valid_bytes, Address in, Address out, int threads) {
    copy_groups(bytes, valid_bytes, pointer<unsigned char>(in), pointer<unsigned char>(out), threads);
  });
}
