// Matrix tiles: eight two-dimensional registers and their products, those of Intel AMX or emulated.
//
// configure(config) says how many rows, and bytes of a row, each tile has, and makes all of them zero. load<t>, store<t>
// and zero<t> work on tile t. multiply_bytes<c, a, b> adds the product of signed bytes of a and unsigned bytes of b to
// c, multiply_bf16<c, a, b> that of bfloat16 numbers.
#pragma once

#if defined(OUTRIDER_TILES_EMULATED)
#include "tile_emulation.hpp"
#else

#include <cstddef>
#include <cstdint>

namespace outrider::OUTRIDER_ISA::tiles {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

// In assembly: the compiler's intrinsics take no template argument as a tile's number, and do not say that they read
// memory.
static inline void configure(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
static inline void release() { asm volatile("tilerelease"); }
template <int t>
static inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(t));
}
template <int t>
static inline void load(const void* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
}
template <int t>
static inline void store(void* to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
}
template <int c, int a, int b>
static inline void multiply_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
static inline void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace outrider::OUTRIDER_ISA::tiles

#endif
