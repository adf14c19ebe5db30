// Chooses the table of kernels at run time: the widest instruction set of this processor, or the one the user asks for.
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(OUTRIDER_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "kernels.hpp"

namespace outrider {

#if defined(OUTRIDER_X86)
namespace amx { extern const Kernels table; }
namespace amx_emulated { extern const Kernels table; }
namespace avx512_bf16 { extern const Kernels table; }
namespace avx512_vnni { extern const Kernels table; }
namespace avx_vnni { extern const Kernels table; }
namespace avx_vnni_emulated { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

namespace {

#if defined(OUTRIDER_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx_vnni() {  // the instruction of processors without AVX-512 (Intel since Alder Lake), in its own encoding
  unsigned a = 0, b, c, d;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return has_avx2() && (a & 1u << 4);
}
bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

#if defined(__linux__)
// Some virtual machines list tiles and fault on them, so a child process tries products first.
bool tiles_work() {
  const pid_t child = fork();
  if (child < 0) return false;
  if (child == 0) {
    for (const int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) std::signal(number, SIG_DFL);
    for (int use = 0; use < kTileUses; use++) amx::table.tile_rows[use] = 1;
    _exit(same_products(amx::table, amx_emulated::table) ? 0 : 1);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return false;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
#endif

// A process has to ask the kernel for the tiles' registers before its first use of them.
std::string ask_for_tiles() {
  unsigned a, b, c, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBF16 | kTile | kInt8;
  if ((d & kAll) != kAll || !has_avx512_bf16()) return "this processor has no matrix tiles (AMX, bfloat16 and int8)";
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0)
    return std::string("the system refused the state of matrix tiles (arch_prctl: ") + std::strerror(errno) + ")";
  return tiles_work() ? "" : "this machine's matrix tiles (AMX) fault or compute something else";
#else
  return "matrix tiles are used on Linux only";
#endif
}
#endif

std::vector<const Kernels*> find_usable() {
  std::vector<const Kernels*> found;
#if defined(OUTRIDER_X86)
  if (why_no_tiles().empty()) found.push_back(&amx::table);
  if (has_avx512_bf16()) found.push_back(&avx512_bf16::table);
  if (has_avx512_vnni()) found.push_back(&avx512_vnni::table);
  if (has_avx_vnni()) found.push_back(&avx_vnni::table);
  if (has_avx2()) found.push_back(&avx2::table);
#endif
  found.push_back(&portable::table);
  return found;
}

// Found once: a virtual machine asks its host what the processor has, which takes microseconds.
const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> found = find_usable();
  return found;
}

std::vector<const Kernels*> emulated() {
  std::vector<const Kernels*> found;
#if defined(OUTRIDER_X86)
  if (has_avx512_bf16()) found.push_back(&amx_emulated::table);
  if (has_avx2()) found.push_back(&avx_vnni_emulated::table);
#endif
  return found;
}

std::vector<std::string> names_of(const std::vector<const Kernels*>& tables) {
  std::vector<std::string> names;
  for (const Kernels* table : tables) names.emplace_back(table->name);
  return names;
}

}  // namespace

const std::string& why_no_tiles() {
#if defined(OUTRIDER_X86)
  static const std::string reason = ask_for_tiles();
#else
  static const std::string reason = "this processor has no matrix tiles (AMX)";
#endif
  return reason;
}

std::vector<std::string> usable_kernels() { return names_of(usable()); }
std::vector<std::string> emulated_kernels() { return names_of(emulated()); }

const Kernels& find_kernels(const std::string& name) {
  std::string wanted = name;
  if (wanted.empty())
    if (const char* variable = std::getenv("OUTRIDER_ISA")) wanted = variable;
  for (const Kernels* table : usable()) {
    const std::string_view has = table->name;
    if (wanted.empty() || wanted == has || (wanted == "avx512" && has.starts_with(wanted))) return *table;
  }
  for (const Kernels* table : emulated())
    if (wanted == table->name) return *table;
  std::string known;
  for (const Kernels* table : usable()) known += (known.empty() ? "" : ", ") + std::string(table->name);
  const std::string reason = wanted == "amx" ? " (" + why_no_tiles() + ")" : "";
  throw std::invalid_argument("instruction set " + wanted + " is not one this processor runs" + reason +
                              "; expected one of: " + known);
}

}  // namespace outrider
