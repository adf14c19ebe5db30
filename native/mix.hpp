// The mixer of the noise: see outrider.noise, which defines it.
#pragma once

#include <cstdint>

namespace outrider {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;

inline uint64_t mix64(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

inline uint64_t absorb(uint64_t key, uint64_t x) { return mix64((key + kGamma) ^ x); }

}  // namespace outrider
