// Chooses the table of kernels at run time: the widest instruction set of this processor, or the one the user asks for.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace outrider {

#if defined(OUTRIDER_X86)
namespace avx512_bf16 { extern const Kernels table; }
namespace avx512_vnni { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

namespace {

#if defined(OUTRIDER_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(OUTRIDER_X86)
  if (has_avx512_bf16()) found.push_back(&avx512_bf16::table);
  if (has_avx512_vnni()) found.push_back(&avx512_vnni::table);
  if (has_avx2()) found.push_back(&avx2::table);
#endif
  found.push_back(&portable::table);
  return found;
}

}  // namespace

std::vector<std::string> usable_kernels() {
  std::vector<std::string> names;
  for (const Kernels* table : usable()) names.emplace_back(table->name);
  return names;
}

const Kernels& find_kernels(const std::string& name) {
  std::string wanted = name;
  if (wanted.empty())
    if (const char* variable = std::getenv("OUTRIDER_ISA")) wanted = variable;
  std::string known;
  for (const Kernels* table : usable()) {
    const std::string has = table->name;
    if (wanted.empty() || wanted == has || (wanted == "avx512" && has.rfind(wanted, 0) == 0)) return *table;
    known += (known.empty() ? "" : ", ") + has;
  }
  throw std::invalid_argument("instruction set " + wanted + " is not one this processor runs; expected one of: " + known);
}

}  // namespace outrider
