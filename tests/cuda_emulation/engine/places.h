// Addresses of code and data as a person knows them.
#pragma once

#include <string>

namespace emulation {

std::string source_line(const void* pc);  // file:line of the instruction that called, from the debug information

}  // namespace emulation
