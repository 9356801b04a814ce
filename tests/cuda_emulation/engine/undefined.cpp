// Undefined behaviour of kernels: misaligned accesses, indices outside an array, shifts too far and the like. g++ puts
// the checks there (-fsanitize=..., each mode has its list in build.py) and calls these functions where one fails; they
// take the place of libubsan, so that the message names the thread and reaches Python as an exception.
#include <cstdint>
#include <string>

#include "state.h"

namespace emulation {
namespace {

struct SourceLocation {  // first in the data of every check
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log2_alignment;
  unsigned char kind;  // load, store, reference, member access, ...
};

struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};

[[noreturn]] void undefined(const SourceLocation& location, const std::string& what) {
  const std::string file = location.file ? location.file : "unknown file";
  fail(file + ':' + std::to_string(location.line), what);
}

}  // namespace
}  // namespace emulation

using emulation::undefined;

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(const emulation::TypeMismatch* check, uintptr_t address) {
  const uintptr_t alignment = uintptr_t{1} << check->log2_alignment;
  const std::string type = check->type->name;
  if (address == 0) undefined(check->location, "access through a null pointer to " + type);
  if (address % alignment == 0) undefined(check->location, "out of bounds: no room for an object of type " + type);
  undefined(check->location, "misaligned access: an address of type " + type + " is " +
                                 std::to_string(address % alignment) + " past a multiple of " +
                                 std::to_string(alignment));
}

void __ubsan_handle_out_of_bounds_abort(const emulation::OutOfBounds* check, uintptr_t index) {
  undefined(check->location, "index " + std::to_string(static_cast<intptr_t>(index)) + " out of bounds of " +
                                 std::string(check->array->name));
}

#define EMULATION_UNDEFINED(name, what) \
  void __ubsan_handle_##name##_abort(const emulation::SourceLocation* check) { undefined(*check, what); }
EMULATION_UNDEFINED(shift_out_of_bounds, "shift by a negative or too large count")
EMULATION_UNDEFINED(divrem_overflow, "division by zero, or of the least integer by -1")
EMULATION_UNDEFINED(add_overflow, "signed overflow in an addition")
EMULATION_UNDEFINED(sub_overflow, "signed overflow in a subtraction")
EMULATION_UNDEFINED(mul_overflow, "signed overflow in a multiplication")
EMULATION_UNDEFINED(negate_overflow, "signed overflow in a negation")
EMULATION_UNDEFINED(pointer_overflow, "pointer arithmetic that overflows")
EMULATION_UNDEFINED(load_invalid_value, "value that is none of its bool or enum type")
EMULATION_UNDEFINED(nonnull_arg, "null pointer for an argument that must not be null")
EMULATION_UNDEFINED(vla_bound_not_positive, "array of variable length without elements")
EMULATION_UNDEFINED(invalid_builtin, "count of leading or trailing zeros of zero")
#undef EMULATION_UNDEFINED

void __ubsan_handle_nonnull_return_v1_abort(const void*, const emulation::SourceLocation* location) {
  undefined(*location, "null pointer returned where it must not be null");
}

// These two have no variant without _abort.
void __ubsan_handle_builtin_unreachable(const emulation::SourceLocation* check) {
  undefined(*check, "__builtin_unreachable() is reached");
}
void __ubsan_handle_missing_return(const emulation::SourceLocation* check) {
  undefined(*check, "a function ends without returning its value");
}
}
