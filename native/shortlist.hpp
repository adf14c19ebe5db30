// A shortlist of a vocabulary: the logits above a bound, and matrix products with only those rows.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace outrider::OUTRIDER_ISA {

// How many of x are not below the bound.
static int64_t count_from(const float* x, int64_t n, float bound) {
  I below[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int v = 0; v < 2; v++) below[v] = count_lanes(below[v], less(load(x + i + v * kLanes), set(bound)));
  int64_t count = i - sum_lanes(below[0] + below[1]);
  for (; i < n; i++) count += !(x[i] < bound);
  return count;
}

// The indices at which x is not below the bound, ascending. Returns their number; there must be room for n.
static int64_t collect(const float* x, int64_t n, float bound, int32_t* indices) {
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t hits = reaching(load(x + i), bound);
    store_set_bits(hits, static_cast<int32_t>(i), indices + count);  // without a branch: hits have no order to predict
    count += __builtin_popcount(hits);
  }
  for (; i < n; i++)
    if (!(x[i] < bound)) indices[count++] = static_cast<int32_t>(i);
  return count;
}

// Multiplies one panel width of a row by that of z. bfloat16 values that are half a panel apart are stored as pairs, so
// that one load gives two vectors in order, or vdpbf16ps multiplies both at once.
struct DotF32 {
  static constexpr int kBytes = kPanel * 4, kOperandBytes = kPanel * 4;
  static inline void prepare(const float* z, char* to) { std::memcpy(to, z, kOperandBytes); }
  static inline void multiply(F (&sum)[kVectors], const char* w, const char* z) {
    const float *row = reinterpret_cast<const float*>(w), *x = reinterpret_cast<const float*>(z);
    for (int v = 0; v < kVectors; v++) sum[v] = fma(load(row + v * kLanes), load(x + v * kLanes), sum[v]);
  }
};

struct DotBF16 {
  static constexpr int kBytes = kPanel * 2;
#if defined(__AVX512BF16__)
  static constexpr int kOperandBytes = kPanel * 2;
  static inline void prepare(const float* z, char* to) {
    for (int v = 0; v < kVectors / 2; v++) {
      const __m256i low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(z + v * kLanes)));
      const __m256i high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(z + kPanel / 2 + v * kLanes)));
      const I pairs = lanes(_mm512_cvtepu16_epi32(low)) | shift_left<16>(lanes(_mm512_cvtepu16_epi32(high)));
      store_int(to + v * kLanes * 4, pairs);
    }
  }
  static inline void multiply(F (&sum)[kVectors], const char* w, const char* z) {
    for (int v = 0; v < kVectors / 2; v++)
      sum[v] = _mm512_dpbf16_ps(sum[v], reinterpret_cast<__m512bh>(load_int(w + v * kLanes * 4)),
                                reinterpret_cast<__m512bh>(load_int(z + v * kLanes * 4)));
  }
#else
  static constexpr int kOperandBytes = kPanel * 4;
  static inline void prepare(const float* z, char* to) {
    for (int i = 0; i < kPanel; i++) {
      const float rounded = from_bf16(to_bf16(z[i]));
      std::memcpy(to + i * 4, &rounded, 4);
    }
  }
  static inline void multiply(F (&sum)[kVectors], const char* w, const char* z) {
    const float* x = reinterpret_cast<const float*>(z);
    for (int v = 0; v < kVectors / 2; v++) {
      const I pair = load_int(w + v * kLanes * 4);
      sum[v] = fma(as_float(shift_left<16>(pair)), load(x + v * kLanes), sum[v]);
      sum[v] = fma(as_float(pair & static_cast<int32_t>(0xffff0000)), load(x + kPanel / 2 + v * kLanes), sum[v]);
    }
  }
#endif
};

template <class Dot, int R>
static inline void dot_some(const RowMajor& w, const char* z, const int32_t* rows, float* out) {
  const char* at[R];
  F sum[R][kVectors];
  for (int r = 0; r < R; r++) {
    at[r] = w.data + rows[r] * w.row_bytes;
    for (int v = 0; v < kVectors; v++) sum[r][v] = set(0.0f);
  }
  for (size_t k = 0; k < w.row_bytes; k += Dot::kBytes, z += Dot::kOperandBytes)
    for (int r = 0; r < R; r++) Dot::multiply(sum[r], at[r] + k, z);
  for (int r = 0; r < R; r++) {
    F total = sum[r][0];
    for (int v = 1; v < kVectors; v++) total = total + sum[r][v];
    out[r] = reduce_add(total);
  }
}

template <class Dot>
static void dot_rows_as(const RowMajor& w, const float* z, const int32_t* rows, int64_t count, float* out) {
  constexpr int kRows = 4, kAhead = 16;  // rows multiplied together, rows prefetched ahead
  alignas(64) char operand[kWidestRow * 4];
  for (int k = 0; k < w.inner; k += kPanel) Dot::prepare(z + k, operand + k / kPanel * Dot::kOperandBytes);
  const auto fetch = [&](int64_t row) {
    for (size_t line = 0; line < w.row_bytes; line += 64) prefetch(w.data + rows[row] * w.row_bytes + line);
  };
  for (int64_t i = 0; i < kAhead && i < count; i++) fetch(i);
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    for (int64_t next = i + kAhead; next < i + kAhead + kRows && next < count; next++) fetch(next);
    dot_some<Dot, kRows>(w, operand, rows + i, out + i);
  }
  for (; i < count; i++) dot_some<Dot, 1>(w, operand, rows + i, out + i);
}

// out[i] = row rows[i] of w times z (rounded to the format of w). The order of each sum does not depend on `count`.
static void dot_rows(const RowMajor& w, const float* z, const int32_t* rows, int64_t count, float* out) {
  if (w.dtype == DType::f32)
    dot_rows_as<DotF32>(w, z, rows, count, out);
  else
    dot_rows_as<DotBF16>(w, z, rows, count, out);
}

}  // namespace outrider::OUTRIDER_ISA
