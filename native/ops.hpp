// The inner step of a product for each number format: kTileRows x P accumulators against one slice of a panel.
//
// An Op says how one step reads a panel (`kBytes` for `kInner` k of P columns), how many bytes of an operand row the
// step takes (`kOperandBytes`), and how the two are multiplied into accumulators of one vector each.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace outrider::OUTRIDER_ISA {

// Software prefetch of weight panels into L2. With few rows the hardware prefetcher alone is best; with more, its
// requests come too late, and between two tiles of rows that share a chunk it stops. A processor drops prefetches that
// come in a burst (Zen 4: most of those closer than 6 cycles), so a piece of a panel is requested line by line, spread
// over the steps of its multiplication. Past the end of a panel this prefetches the next one.
constexpr int kFewRows = kTileRows / 3;
static ReadAhead read_ahead{{8192}, {{kFewRows + 1}, {kFewRows + 1}, {kFewRows + 1}, {kFewRows / 2 + 1}}};

// Bytes between what `rows` rows multiply and what they prefetch; 0: no prefetch.
static inline int ahead_of(Width width, int rows) {
  return rows < read_ahead.rows[static_cast<int>(width)].load(std::memory_order_relaxed)
             ? 0
             : read_ahead.bytes.load(std::memory_order_relaxed);
}

// The share of step `step` of kSteps in a piece of kBytes.
template <int kBytes, int kSteps>
static inline void prefetch_share(const char* piece, int step, int ahead) {
  constexpr int kLines = (kBytes + 63) / 64;
  if (!ahead) return;
  for (int line = kLines * step / kSteps; line < kLines * (step + 1) / kSteps; line++)
    prefetch(piece + ahead + line * 64);
}

static inline int32_t four_bytes(const char* p) { int32_t v; std::memcpy(&v, p, 4); return v; }
static inline float one_float(const char* p) { float v; std::memcpy(&v, p, 4); return v; }

// What one part of a step multiplies: a vector per kVectors columns of the panel. Instruction sets without a product of
// pairs or quads unpack a step to several parts, one after the other, so that only one of them takes up registers.
struct FloatSlice { F w[kVectors]; };
struct IntSlice { I w[kVectors]; };

// float32: one k a step.
struct OpF32 {
  using Acc = F;
  static constexpr Width kWidth = Width::float32;
  static constexpr int kInner = 1, kBytes = kPanel * 4, kOperandBytes = 4, kParts = 1;
  template <int>
  static inline FloatSlice read(const char* w) {
    FloatSlice s;
    for (int v = 0; v < kVectors; v++) s.w[v] = load(reinterpret_cast<const float*>(w) + v * kLanes);
    return s;
  }
  template <int>
  static inline void multiply(F (&acc)[kVectors], const FloatSlice& s, const char* x) {
    const F b = set(one_float(x));
    for (int v = 0; v < kVectors; v++) acc[v] = fma(s.w[v], b, acc[v]);
  }
};

// bfloat16 pairs: two k a step, in float32 accumulators.
struct OpBF16 {
  using Acc = F;
  static constexpr Width kWidth = Width::bfloat16;
  static constexpr int kInner = 2, kBytes = kPanel * 4;
#if defined(__AVX512BF16__)
  static constexpr int kOperandBytes = 4, kParts = 1;
  template <int>
  static inline IntSlice read(const char* w) {
    IntSlice s;
    for (int v = 0; v < kVectors; v++) s.w[v] = load_int(w + v * kLanes * 4);
    return s;
  }
  template <int>
  static inline void multiply(F (&acc)[kVectors], const IntSlice& s, const char* x) {
    const I b = set_int(four_bytes(x));
    for (int v = 0; v < kVectors; v++) acc[v] = _mm512_dpbf16_ps(acc[v], reinterpret_cast<__m512bh>(s.w[v]), reinterpret_cast<__m512bh>(b));
  }
#else  // operands stay float32, already rounded to bfloat16; the parts are the even and the odd k
  static constexpr int kOperandBytes = 8, kParts = 2;
  template <int part>
  static inline FloatSlice read(const char* w) {
    FloatSlice s;
    for (int v = 0; v < kVectors; v++) {
      const I pair = load_int(w + v * kLanes * 4);
      s.w[v] = as_float(part ? pair & static_cast<int32_t>(0xffff0000) : shift_left<16>(pair));
    }
    return s;
  }
  template <int part>
  static inline void multiply(F (&acc)[kVectors], const FloatSlice& s, const char* x) {
    const F b = set(one_float(x + part * 4));
    for (int v = 0; v < kVectors; v++) acc[v] = fma(s.w[v], b, acc[v]);
  }
#endif
};

// Four unsigned 8-bit weights a lane, times four signed 8-bit activations; exact in int32.
struct Quad {
#if defined(OUTRIDER_DOT_BYTES)
  static constexpr int kOperandBytes = 4, kParts = 1;
  template <int>
  static inline I unpack(I w) { return w; }
  template <int>
  static inline void multiply(I (&acc)[kVectors], const IntSlice& s, const char* x) {
    const I b = set_int(four_bytes(x));
    for (int v = 0; v < kVectors; v++) acc[v] = dot_bytes(acc[v], s.w[v], b);
  }
#elif defined(__AVX2__)  // activations are int16 in the order k0 k2 k1 k3, so that no product saturates
  static constexpr int kOperandBytes = 8, kParts = 2;
  template <int part>
  static inline I unpack(I w) { return part ? lanes(_mm256_srli_epi16(raw(w), 8)) : w & 0x00ff00ff; }
  template <int part>
  static inline void multiply(I (&acc)[kVectors], const IntSlice& s, const char* x) {
    const I b = set_int(four_bytes(x + part * 4));
    for (int v = 0; v < kVectors; v++) acc[v] += lanes(_mm256_madd_epi16(raw(s.w[v]), raw(b)));
  }
#else
  static constexpr int kOperandBytes = 4, kParts = 4;
  template <int part>
  static inline I unpack(I w) { return shift_right<8 * part>(w) & 255; }
  template <int part>
  static inline void multiply(I (&acc)[kVectors], const IntSlice& s, const char* x) {
    for (int v = 0; v < kVectors; v++) acc[v] += s.w[v] * set_int(static_cast<int8_t>(x[part]));
  }
#endif
};

// int8: four k a step.
struct OpI8 : Quad {
  using Acc = I;
  static constexpr Width kWidth = Width::byte;
  static constexpr int kInner = 4, kBytes = kPanel * 4;
  template <int part>
  static inline IntSlice read(const char* w) {
    IntSlice s;
    for (int v = 0; v < kVectors; v++) s.w[v] = unpack<part>(load_int(w + v * kLanes * 4));
    return s;
  }
};

// The parts of one step, each for all M rows.
template <class Op, int M, int part = 0>
static inline void step(const char* w, const char* x, size_t x_stride, typename Op::Acc (&acc)[M][kVectors]) {
  const auto slice = Op::template read<part>(w);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    Op::template multiply<part>(acc[m], slice, x + m * x_stride);
    keep_in_registers(acc[m]);
  }
  if constexpr (part + 1 < Op::kParts) step<Op, M, part + 1>(w, x, x_stride, acc);
}

// `steps` steps of M rows against one panel slice. acc starts as given.
template <class Op, int M>
static inline void tile(const char* w, const char* x, size_t x_stride, int steps, int ahead,
                        typename Op::Acc (&acc)[M][kVectors]) {
  for (int s = 0; s < steps; s++) {
    prefetch_share<Op::kBytes, 1>(w, 0, ahead);
    step<Op, M>(w, x, x_stride, acc);
    w += Op::kBytes;
    x += Op::kOperandBytes;
  }
}

// int4: a group is P bfloat16 scales, then kGroup / 4 steps of nibbles; low nibbles are the panel's first half.
// Integer sums of a group are scaled and added to float32 accumulators, group after group.
constexpr int kGroupSteps = kGroup / 4;
constexpr int kNibbleBytes = kPanel * 2;

static inline void group_scales(const char* group, F (&scale)[kVectors]) {
  for (int v = 0; v < kVectors / 2; v++) {
    const I both = load_int(group + v * kLanes * 4);
    scale[v] = as_float(shift_left<16>(both));
    scale[v + kVectors / 2] = as_float(both & static_cast<int32_t>(0xffff0000));
  }
}

// How groups are stored: P scales (bfloat16 in int4, else fp16), P fp16 minima where the format has them, the values.
struct GroupI4 {
  static constexpr bool kNibbles = true, kBlocks = false, kMinimum = false, kStart = true;
};
struct GroupQ80 {
  static constexpr bool kNibbles = false, kBlocks = true, kMinimum = false, kStart = true;
};
struct GroupQ40 {
  static constexpr bool kNibbles = true, kBlocks = true, kMinimum = false, kStart = true;
};
struct GroupQ41 {  // stored as it is: no sum to start from
  static constexpr bool kNibbles = true, kBlocks = true, kMinimum = true, kStart = false;
};
struct GroupQ8Min {
  static constexpr bool kNibbles = false, kBlocks = true, kMinimum = true, kStart = true;
};

template <class Format>
struct GroupSizes {
  static constexpr int kHeader = kPanel * (Format::kMinimum ? 4 : 2);
  static constexpr int kBytes = kHeader + kGroupSteps * (Format::kNibbles ? kNibbleBytes : OpI8::kBytes);
  static constexpr int kOperandBytes = Format::kNibbles ? kGroup : kGroupSteps * OpI8::kOperandBytes;
  static constexpr Width kWidth = Format::kNibbles ? Width::nibble : Width::byte;
};

#if defined(__AVX2__) && !defined(OUTRIDER_DOT_BYTES)
// 15 * 127 * 2 * (kGroup / 4) stays under 2^15, so a whole group sums in int16.
static_assert(15 * 127 * 2 * kGroupSteps < 32768);
template <class Format, int M>
static inline void group_product(const char* group, const char* x, size_t x_stride, int ahead,
                                 I (&acc)[M][kVectors]) {
  typedef int16_t Pairs __attribute__((vector_size(32)));
  const char* w = group + GroupSizes<Format>::kHeader;
  Pairs sum[M][kVectors] = {};
#pragma GCC unroll 8
  for (int s = 0; s < kGroupSteps; s++, w += kNibbleBytes, x += 4) {
    prefetch_share<GroupSizes<Format>::kBytes, kGroupSteps>(group, s, ahead);
    const I both = load_int(w);
    const __m256i low = raw(both & 0x0f0f0f0f), high = raw(shift_right<4>(both) & 0x0f0f0f0f);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const __m256i b = raw(set_int(four_bytes(x + m * x_stride)));
      sum[m][0] += reinterpret_cast<Pairs>(_mm256_maddubs_epi16(low, b));
      sum[m][1] += reinterpret_cast<Pairs>(_mm256_maddubs_epi16(high, b));
      keep_in_registers(sum[m]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kVectors; v++)
      acc[m][v] += lanes(_mm256_madd_epi16(reinterpret_cast<__m256i>(sum[m][v]), _mm256_set1_epi16(1)));
}
#else
// One part of a step of nibbles, then the next ones.
template <int M, int part = 0>
static inline void nibble_step(const char* w, const char* x, size_t x_stride, I (&acc)[M][kVectors]) {
  IntSlice slice;
  for (int v = 0; v < kVectors / 2; v++) {
    const I both = load_int(w + v * kLanes * 4);
    slice.w[v] = Quad::unpack<part>(both & 0x0f0f0f0f);
    slice.w[v + kVectors / 2] = Quad::unpack<part>(shift_right<4>(both) & 0x0f0f0f0f);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    Quad::multiply<part>(acc[m], slice, x + m * x_stride);
    keep_in_registers(acc[m]);
  }
  if constexpr (part + 1 < Quad::kParts) nibble_step<M, part + 1>(w, x, x_stride, acc);
}

template <class Format, int M>
static inline void group_product(const char* group, const char* x, size_t x_stride, int ahead,
                                 I (&acc)[M][kVectors]) {
  const char* w = group + GroupSizes<Format>::kHeader;
#pragma GCC unroll 8
  for (int s = 0; s < kGroupSteps; s++, w += kNibbleBytes, x += 4) {
    prefetch_share<GroupSizes<Format>::kBytes, kGroupSteps>(group, s, ahead);
    nibble_step<M>(w, x, x_stride, acc);
  }
}
#endif

// 8-bit groups: kGroup / 4 steps as int8 has them.
template <class Format, int M>
static inline void byte_product(const char* group, const char* x, size_t x_stride, int ahead,
                                 I (&acc)[M][kVectors]) {
  const char* w = group + GroupSizes<Format>::kHeader;
#pragma GCC unroll 8
  for (int s = 0; s < kGroupSteps; s++, w += OpI8::kBytes, x += OpI8::kOperandBytes) {
    prefetch_share<GroupSizes<Format>::kBytes, kGroupSteps>(group, s, ahead);
    step<OpI8, M>(w, x, x_stride, acc);
  }
}

}  // namespace outrider::OUTRIDER_ISA
