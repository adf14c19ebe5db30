// Chooses the kernels at run time: the widest instruction set this processor has, or the one the user asks for.
#include <cstdlib>
#include <cstring>
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

}  // namespace

const Kernels* find_kernels(const char* name) {
  const std::string wanted = name;
#if defined(OUTRIDER_X86)
  const bool any512 = wanted == "avx512";
  if ((any512 || wanted == "avx512_bf16") && has_avx512_bf16()) return &avx512_bf16::table;
  if ((any512 || wanted == "avx512_vnni") && has_avx512_vnni()) return &avx512_vnni::table;
  if (wanted == "avx2" && has_avx2()) return &avx2::table;
#endif
  if (wanted == "portable") return &portable::table;
  return nullptr;
}

const Kernels& kernels() {
  if (const char* wanted = std::getenv("OUTRIDER_ISA"); wanted && *wanted) {
    if (const Kernels* found = find_kernels(wanted)) return *found;
    throw std::runtime_error(std::string("OUTRIDER_ISA=") + wanted +
                             " is not an instruction set of this processor; expected avx512, avx2 or portable");
  }
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = find_kernels(name)) return *found;
  return portable::table;
}

}  // namespace outrider
