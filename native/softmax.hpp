// Softmax of rows of logits in parts: exponentials and their sums, residuals of two distributions, block maxima.
#pragma once

#include "simd.hpp"

namespace outrider::OUTRIDER_ISA {

template <bool divided>
static double exp_sum_as(const float* x, int64_t n, float temperature, float shift, float scale, float* out) {
  const auto one = [&](F v) {
    if constexpr (divided) v = v / set(temperature);
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

// exp(x / temperature - shift) * scale, written to `out` unless that is null. Returns the sum.
static double exp_sum(const float* x, int64_t n, float temperature, float shift, float scale, float* out) {
  return temperature == 1.0f ? exp_sum_as<false>(x, n, temperature, shift, scale, out)
                             : exp_sum_as<true>(x, n, temperature, shift, scale, out);
}

// p = max(weight * p - q, 0), in place. Returns the sum.
static double residual_sum(float* p, const float* q, int64_t n, float weight) {
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

// out[j] = the largest of the `blocks` values x[j], x[j + length], x[j + 2 * length], ...
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
