// SplitMix64 (Steele, Lea, Flood 2014), the mixer behind all random numbers; outrider.sampling.rng defines how it is used.
#pragma once

#include <cstdint>

namespace outrider {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15, kMix1 = 0xBF58476D1CE4E5B9, kMix2 = 0x94D049BB133111EB;

// These are static because kernels.cpp is compiled once per instruction set: the linker must not merge the copies.

// SplitMix64 without its last step, which changes the result by less than one part in 2^30.
static inline uint64_t splitmix_rounds(uint64_t x) {
  x = (x ^ x >> 30) * kMix1;
  return (x ^ x >> 27) * kMix2;
}

static inline uint64_t splitmix(uint64_t x) {
  x = splitmix_rounds(x);
  return x ^ x >> 31;
}

static inline uint64_t absorb(uint64_t key, uint64_t x) { return splitmix((key + kGamma) ^ x); }

}  // namespace outrider
