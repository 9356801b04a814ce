#include "places.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace emulation {

// addr2line (binutils, as g++) reads the debug information. LD_PRELOAD is for this process, not for that one.
std::string source_line(const void* pc) {
  Dl_info module;
  const char* const call = static_cast<const char*>(pc) - 1;  // pc is where a call returns to
  if (!dladdr(call, &module)) return "unknown line";
  char command[4096];
  std::snprintf(command, sizeof command, "env -u LD_PRELOAD addr2line -e '%s' %#zx 2>/dev/null", module.dli_fname,
                static_cast<size_t>(call - static_cast<const char*>(module.dli_fbase)));
  std::string line;
  if (FILE* const pipe = popen(command, "r")) {
    for (int c; (c = std::fgetc(pipe)) != EOF && c != '\n' && c != ' ';) line += static_cast<char>(c);
    pclose(pipe);
  }
  if (line.empty() || line[0] == '?') return "unknown line";
  if (line.compare(0, 2, "./") == 0) line.erase(0, 2);
  return line;
}

}  // namespace emulation
