// The matrix tiles of Intel AMX in plain C++, bit for bit, so that a machine without them runs what is written for them.
//
// Eight tiles of up to 16 rows of 64 bytes. A product of bfloat16 pairs sums the even and the odd elements in two chains
// of fused multiply-adds from zero, adds the two, then adds the accumulator, each rounded to nearest even; denormal
// inputs and results become zero. (A result that is denormal but rounds up to the smallest normal number is the one
// case where hardware may differ.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace outrider::OUTRIDER_ISA::tiles {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};
};

namespace emulated {

struct Tile {
  alignas(64) char row[16][64];
};
inline thread_local Config config;
inline thread_local Tile tile[8];

static inline float flushed(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }
static inline float widened(uint16_t a) {
  const uint32_t bits = static_cast<uint32_t>(a) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

}  // namespace emulated

static inline void configure(const Config& config) {
  emulated::config = config;
  std::memset(emulated::tile, 0, sizeof emulated::tile);
}
static inline void release() {}

template <int t>
static inline void zero() {
  std::memset(&emulated::tile[t], 0, sizeof(emulated::Tile));
}

template <int t>
static inline void load(const void* from, size_t stride) {
  zero<t>();
  for (int r = 0; r < emulated::config.rows[t]; r++)
    std::memcpy(emulated::tile[t].row[r], static_cast<const char*>(from) + r * stride, emulated::config.bytes[t]);
}

template <int t>
static inline void store(void* to, size_t stride) {
  for (int r = 0; r < emulated::config.rows[t]; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated::tile[t].row[r], emulated::config.bytes[t]);
}

// c += a b for signed bytes of a and unsigned bytes of b, four k a lane.
template <int c, int a, int b>
static inline void multiply_bytes() {
  for (int m = 0; m < emulated::config.rows[c]; m++) {
    int32_t sum[16];
    std::memcpy(sum, emulated::tile[c].row[m], sizeof sum);
    for (int k = 0; k < emulated::config.rows[b]; k++)
      for (int n = 0; n < 16; n++)
        for (int j = 0; j < 4; j++)
          sum[n] += static_cast<int8_t>(emulated::tile[a].row[m][4 * k + j]) *
                    static_cast<uint8_t>(emulated::tile[b].row[k][4 * n + j]);
    std::memcpy(emulated::tile[c].row[m], sum, sizeof sum);
  }
}

// c += a b for bfloat16, two k a lane.
template <int c, int a, int b>
static inline void multiply_bf16() {
  for (int m = 0; m < emulated::config.rows[c]; m++) {
    float even[16] = {}, odd[16] = {}, sum[16];
    uint16_t x[32];
    std::memcpy(x, emulated::tile[a].row[m], sizeof x);
    std::memcpy(sum, emulated::tile[c].row[m], sizeof sum);
    for (int k = 0; k < emulated::config.rows[b]; k++) {
      uint16_t w[32];
      std::memcpy(w, emulated::tile[b].row[k], sizeof w);
      const float first = emulated::widened(x[2 * k]), second = emulated::widened(x[2 * k + 1]);
      for (int n = 0; n < 16; n++) {
        even[n] = emulated::flushed(__builtin_fmaf(first, emulated::widened(w[2 * n]), even[n]));
        odd[n] = emulated::flushed(__builtin_fmaf(second, emulated::widened(w[2 * n + 1]), odd[n]));
      }
    }
    for (int n = 0; n < 16; n++)
      sum[n] = emulated::flushed(emulated::flushed(sum[n]) + emulated::flushed(even[n] + odd[n]));
    std::memcpy(emulated::tile[c].row[m], sum, sizeof sum);
  }
}

}  // namespace outrider::OUTRIDER_ISA::tiles
