// Operations on single rows of activations: norms, conversion and quantisation to operands, rotary positions,
// activations.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "ops.hpp"

namespace outrider::OUTRIDER_ISA {

static inline float sum_of_squares(const float* x, int n) {
  F sum = set(0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = load(x + i);
    sum = fma(v, v, sum);
  }
  float total = reduce_add(sum);
  for (; i < n; i++) total += x[i] * x[i];
  return total;
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// NaN where the squares overflow: 1 / inf would turn a broken row into zeros, which look like a healthy one.
static inline float inverse_rms(const float* x, float eps, int n) {
  const float mean = sum_of_squares(x, n) / static_cast<float>(n) + eps;
  return mean <= std::numeric_limits<float>::max() ? 1.0f / std::sqrt(mean) : kNaN;
}

static void rms_norm(const float* x, const float* gain, float eps, int width, float* out) {
  const float scale = inverse_rms(x, eps, width);
  for (int i = 0; i < width; i++) out[i] = x[i] * scale * gain[i];
}

static int operand_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32: return 4;
    case DType::bf16: return OpBF16::kOperandBytes / 2;
    case DType::i8:
    case DType::q8_0:
    case DType::q8_min: return OpI8::kOperandBytes / 4;
    default: return 1;
  }
}

static inline void convert_bf16(const float* x, int n, char* out) {
#if defined(__AVX512BF16__)
  int i = 0;
  for (; i + kLanes <= n; i += kLanes, out += kLanes * 2) {
    const __m256bh half = _mm512_cvtneps_pbh(load(x + i));
    std::memcpy(out, &half, sizeof half);
  }
  for (; i < n; i++, out += 2) {
    const uint16_t bits = to_bf16(x[i]);
    std::memcpy(out, &bits, 2);
  }
#else
  for (int i = 0; i < n; i++, out += 4) {
    const float value = from_bf16(to_bf16(x[i]));
    std::memcpy(out, &value, 4);
  }
#endif
}

// Quantised values as operands of Quads: bytes in order, or with `wide`, which AVX2 alone asks for, int16 as k0 k2 k1 k3.
template <bool wide>
static inline void store_quantised(I q, char* to) {
#if defined(__AVX512VNNI__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(raw(q)));
#elif defined(__AVX2__)
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(raw(q)), _mm256_extracti128_si256(raw(q), 1));
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  if constexpr (wide)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(half, order));
  else
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(half, half));
#else
  for (int l = 0; l < kLanes; l++) to[l] = static_cast<char>(q[l]);
#endif
}

// Symmetric 8-bit quantisation of n values, n a multiple of `span`; sums[j] = -zero * sum of the j-th span. A row that
// begins with NaN (see inverse_rms) has a scale of NaN, so that whatever is multiplied with it is NaN.
template <bool wide>
static inline float quantise(const float* x, int n, int span, int zero, char* out, int32_t* sums) {
  if (std::isnan(x[0])) {
    std::memset(out, 0, static_cast<size_t>(n) * (wide ? 2 : 1));
    std::memset(sums, 0, static_cast<size_t>(n / span) * sizeof(int32_t));
    return kNaN;
  }
  F most = set(1e-10f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max(most, abs(load(x + i)));
  alignas(64) float rest[kLanes] = {};
  std::memcpy(rest, x + i, (n - i) * sizeof(float));
  const float largest = reduce_max(max(most, abs(load(rest))));
  const F inverse = set(127.0f / largest);
  for (int begin = 0; begin < n; begin += span, sums++) {
    I sum = {};
    for (i = begin; i + kLanes <= begin + span; i += kLanes) {
      const I q = to_int(load(x + i) * inverse);
      sum += q;
      store_quantised<wide>(q, out + (wide ? 2 : 1) * static_cast<ptrdiff_t>(i));
    }
    if (i < begin + span) {  // n is the only span, and no multiple of the vector length
      alignas(64) char bytes[2 * kLanes];
      const I q = to_int(load(rest) * inverse);
      sum += q;
      store_quantised<wide>(q, bytes);
      std::memcpy(out + (wide ? 2 : 1) * static_cast<ptrdiff_t>(i), bytes, (wide ? 2 : 1) * (n - i));
    }
    *sums = -zero * sum_lanes(sum);
  }
  return largest / 127.0f;
}

// The same with a scale for every kGroup values: offsets[j] = scale[j] * sum of group j. n is a multiple of kGroup.
template <bool wide>
static inline void quantise_blocks(const float* x, int n, int zero, char* out, float* scale, int32_t* sums,
                                   float* offsets) {
  constexpr int kParts = kGroup / kLanes;
  for (int begin = 0; begin < n; begin += kGroup, x += kGroup, out += (wide ? 2 : 1) * kGroup) {
    if (std::isnan(x[0])) {
      std::memset(out, 0, (wide ? 2 : 1) * kGroup);
      *scale++ = *offsets++ = kNaN;
      *sums++ = 0;
      continue;
    }
    F part[kParts];
    F most = set(1e-10f);
    for (int i = 0; i < kParts; i++) most = max(most, abs(part[i] = load(x + i * kLanes)));
    const float largest = reduce_max(most);
    const F inverse = set(127.0f / largest);
    I sum = {};
    for (int i = 0; i < kParts; i++) {
      const I q = to_int(part[i] * inverse);
      sum += q;
      store_quantised<wide>(q, out + (wide ? 2 : 1) * static_cast<ptrdiff_t>(i * kLanes));
    }
    const int total = sum_lanes(sum);
    *scale = largest / 127.0f;
    *sums++ = -zero * total;
    *offsets++ = *scale * static_cast<float>(total);
    scale++;
  }
}

static void prepare(DType dtype, const float* x, const float* gain, float eps, int width, int inner, float* scratch,
                    const Operand& out, int row) {
  char* to = out.data + row * out.stride;
  if (gain) {
    float* normalised = dtype == DType::f32 ? reinterpret_cast<float*>(to) : scratch;
    rms_norm(x, gain, eps, width, normalised);
    for (int i = width; i < inner; i++) normalised[i] = 0.0f;
    x = normalised;
    if (dtype == DType::f32) return;
  } else if (inner > width) {
    std::memcpy(scratch, x, width * sizeof(float));
    std::memset(scratch + width, 0, (inner - width) * sizeof(float));
    x = scratch;
  }
  switch (dtype) {
    case DType::f32: std::memcpy(to, x, inner * sizeof(float)); break;
    case DType::bf16: convert_bf16(x, inner, to); break;
    case DType::i8:
      out.scale[row] = quantise<OpI8::kOperandBytes == 8>(x, inner, inner, kInt8Zero, to,
                                                          out.sums + static_cast<ptrdiff_t>(row) * out.sums_stride);
      break;
    case DType::i4:
      out.scale[row] = quantise<false>(x, inner, kGroup, kInt4Zero, to,
                                       out.sums + static_cast<ptrdiff_t>(row) * out.sums_stride);
      break;
    default: {
      const ptrdiff_t first = static_cast<ptrdiff_t>(row) * out.sums_stride;
      const auto convert = is_nibbles(dtype) ? quantise_blocks<false> : quantise_blocks<OpI8::kOperandBytes == 8>;
      convert(x, inner, zero_of(dtype), to, out.scale + first, out.sums + first, out.offsets + first);
    }
  }
}

static void accumulate(float* x, const float* y, const float* gain, float eps, float scalar, int width,
                       float* scratch) {
  if (gain) {
    rms_norm(y, gain, eps, width, scratch);
    y = scratch;
  }
  if (scalar == 1.0f)
    for (int i = 0; i < width; i++) x[i] += y[i];
  else
    for (int i = 0; i < width; i++) x[i] = (x[i] + y[i]) * scalar;
}

// act(gate) * up; count is a multiple of the vector length.
static void activate(Activation kind, const float* gate, const float* up, int count, float* out) {
  const F one = set(1.0f);
  for (int i = 0; i < count; i += kLanes) {
    const F g = load(gate + i);
    F a;
    if (kind == Activation::silu) {
      a = g / (one + exp(set(0.0f) - g));
    } else if (kind == Activation::gelu_tanh) {  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
      const F u = set(0.7978845608028654f) * fma(set(0.044715f) * g * g, g, g);
      a = g / (one + exp(set(-2.0f) * u));
    } else {
      alignas(64) float v[kLanes];
      store(v, g);
      for (int l = 0; l < kLanes; l++) v[l] = 0.5f * v[l] * (1.0f + std::erf(v[l] * 0.70710678118654752f));
      a = load(v);
    }
    store(out + i, a * load(up + i));
  }
}

static void rotate(const float* x, const float* gain, float eps, const float* cosine, const float* sine, float factor,
                   int head_dim, float* out) {
  const int half = head_dim / 2;
  float normalised[512];
  if (gain) {
    rms_norm(x, gain, eps, head_dim, normalised);
    x = normalised;
  }
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    out[i] = (a * cosine[i] - b * sine[i]) * factor;
    out[i + half] = (b * cosine[i] + a * sine[i]) * factor;
  }
}

static void softcap(float* x, int64_t count, float cap) {
  int64_t i = 0;
  const F inverse = set(1.0f / cap);
  for (; i + kLanes <= count; i += kLanes) store(x + i, set(cap) * tanh(load(x + i) * inverse));
  if (i < count) {
    alignas(64) float rest[kLanes] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(float));
    store(rest, set(cap) * tanh(load(rest) * inverse));
    std::memcpy(x + i, rest, (count - i) * sizeof(float));
  }
}

static void keep_larger(const float* x, int64_t count, int32_t piece, float* best, int32_t* from) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const bool whole = c + kLanes <= count;  // few columns are ever reached, and those are looked at one by one
    uint32_t hits = whole ? ~bits(less(load(x + c), load(best + c))) & ((1u << kLanes) - 1) : (1u << (count - c)) - 1;
    for (; hits; hits &= hits - 1) {
      const int64_t i = c + __builtin_ctz(hits);
      if (x[i] > best[i] || x[i] != x[i]) {
        best[i] = x[i];
        from[i] = piece;
      }
    }
  }
}

}  // namespace outrider::OUTRIDER_ISA
