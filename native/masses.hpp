// Rows of logits as probabilities: exponentials, residuals, and bounds under which few of many lie.
#pragma once

#include "simd.hpp"

namespace outrider::OUTRIDER_ISA {

template <bool divided>
static double exps_of(const float* x, int64_t n, float divisor, float shift, float scale, float* out) {
  const auto one = [&](F v) {
    if constexpr (divided) v = v / set(divisor);
    return exp(v - set(shift)) * set(scale);
  };
  F sum = set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F value = one(load(x + i));
    if (out) store(out + i, value);
    sum = sum + value;
  }
  double total = reduce_add(sum);
  if (i < n) {
    alignas(64) float rest[kLanes];
    for (int l = 0; l < kLanes; l++) rest[l] = i + l < n ? x[i + l] : -INFINITY;
    const F value = one(load(rest));
    store(rest, value);
    if (out) std::memcpy(out + i, rest, (n - i) * sizeof(float));
    total += reduce_add(value);
  }
  return total;
}

// exp(x / divisor - shift) * scale, into `out` unless that is null. Returns the sum.
static double exps(const float* x, int64_t n, float divisor, float shift, float scale, float* out) {
  return divisor == 1.0f ? exps_of<false>(x, n, divisor, shift, scale, out)
                         : exps_of<true>(x, n, divisor, shift, scale, out);
}

// p = max(weight * p - q, 0). Returns the sum.
static double excess(float* p, const float* q, int64_t n, float weight) {
  F sum = set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F value = max(load(p + i) * set(weight) - load(q + i), set(0.0f));
    store(p + i, value);
    sum = sum + value;
  }
  double total = reduce_add(sum);
  for (; i < n; i++) {
    const float value = p[i] * weight - q[i];
    total += p[i] = value > 0.0f ? value : 0.0f;
  }
  return total;
}

// out[j] = the largest of x[j], x[j + length], ..., `blocks` of them.
static void fold_max(const float* x, int64_t blocks, int64_t length, float* out) {
  std::memcpy(out, x, length * sizeof(float));
  for (int64_t b = 1; b < blocks; b++) {
    const float* row = x + b * length;
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) store(out + j, max(load(row + j), load(out + j)));
    for (; j < length; j++) out[j] = row[j] > out[j] ? row[j] : out[j];
  }
}

}  // namespace outrider::OUTRIDER_ISA
