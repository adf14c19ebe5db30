// One float vector type per instruction set, with the few operations the kernels need.
// Included once per build of kernels.cpp; OUTRIDER_ISA names the namespace, the compiler's flags choose the branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace outrider::OUTRIDER_ISA {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

using F = __m512;
// 32-bit lanes by type, not __m512i: GCC copies registers where it must see one as the other.
typedef int32_t I __attribute__((vector_size(64)));
using Mask = __mmask16;
constexpr int kLanes = 16, kVectors = 2, kTileRows = 14;

static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
static inline F set(float a) { return _mm512_set1_ps(a); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F abs(F a) { return _mm512_abs_ps(a); }
static inline F round(F a) { return _mm512_roundscale_ps(a, 0); }
static inline Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
static inline uint32_t bits(Mask m) { return m; }
static inline __m512i raw(I a) { return reinterpret_cast<__m512i>(a); }
static inline I lanes(__m512i a) { return reinterpret_cast<I>(a); }
static inline F as_float(I a) { return reinterpret_cast<F>(a); }
static inline I as_int(F a) { return reinterpret_cast<I>(a); }
static inline I load_int(const void* p) { return lanes(_mm512_loadu_si512(p)); }
static inline void store_int(void* p, I a) { _mm512_storeu_si512(p, raw(a)); }
static inline I set_int(int32_t a) { return lanes(_mm512_set1_epi32(a)); }
template <int n> static inline I shift_left(I a) { return lanes(_mm512_slli_epi32(raw(a), n)); }
template <int n> static inline I shift_right(I a) { return lanes(_mm512_srli_epi32(raw(a), n)); }
static inline F to_float(I a) { return _mm512_cvtepi32_ps(raw(a)); }
static inline I to_int(F a) { return lanes(_mm512_cvtps_epi32(a)); }
// counts + 1 in the lanes of the mask.
static inline I count_lanes(I counts, Mask m) {
  return lanes(_mm512_mask_sub_epi32(raw(counts), m, raw(counts), _mm512_set1_epi32(-1)));
}
static inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
static inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
// Each lane of acc plus the products of four unsigned bytes of a with four signed bytes of b.
#define OUTRIDER_DOT_BYTES
static inline I dot_bytes(I acc, I a, I b) { return lanes(_mm512_dpbusd_epi32(raw(acc), raw(a), raw(b))); }

#elif defined(__AVX2__)

using F = __m256;
typedef int32_t I __attribute__((vector_size(32)));
using Mask = __m256;
constexpr int kLanes = 8, kVectors = 2, kTileRows = 6;

static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
static inline F set(float a) { return _mm256_set1_ps(a); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
static inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Mask less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
static inline uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
static inline __m256i raw(I a) { return reinterpret_cast<__m256i>(a); }
static inline I lanes(__m256i a) { return reinterpret_cast<I>(a); }
static inline F as_float(I a) { return reinterpret_cast<F>(a); }
static inline I as_int(F a) { return reinterpret_cast<I>(a); }
static inline I load_int(const void* p) { return lanes(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
static inline void store_int(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), raw(a)); }
static inline I set_int(int32_t a) { return lanes(_mm256_set1_epi32(a)); }
template <int n> static inline I shift_left(I a) { return lanes(_mm256_slli_epi32(raw(a), n)); }
template <int n> static inline I shift_right(I a) { return lanes(_mm256_srli_epi32(raw(a), n)); }
static inline F to_float(I a) { return _mm256_cvtepi32_ps(raw(a)); }
static inline I to_int(F a) { return lanes(_mm256_cvtps_epi32(a)); }
static inline I count_lanes(I counts, Mask m) { return counts - as_int(m); }
static inline float reduce_add(F a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float reduce_max(F a) {
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
}
#if defined(__AVXVNNI__)
#define OUTRIDER_DOT_BYTES
static inline I dot_bytes(I acc, I a, I b) { return lanes(_mm256_dpbusd_avx_epi32(raw(acc), raw(a), raw(b))); }
#elif defined(OUTRIDER_DOT_BYTES_EMULATED)  // the same sums in more steps, for processors that lack the instruction
#define OUTRIDER_DOT_BYTES
static inline I dot_bytes(I acc, I a, I b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(raw(a), _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(raw(b), 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(raw(a), 8), _mm256_srai_epi16(raw(b), 8));
  return acc + lanes(even) + lanes(odd);
}
#endif

#else

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
using Mask = I;
constexpr int kLanes = 4, kVectors = 4, kTileRows = 3;

static inline F load(const float* p) { F a; std::memcpy(&a, p, sizeof a); return a; }
static inline void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
static inline F set(float a) { return F{a, a, a, a}; }
static inline F fma(F a, F b, F c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
static inline Mask less(F a, F b) { return a < b; }
static inline F select(Mask m, F a, F b) { return m ? a : b; }
static inline uint32_t bits(Mask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
static inline F max(F a, F b) { return a > b ? a : b; }
static inline F min(F a, F b) { return a < b ? a : b; }
static inline F as_float(I a) { return reinterpret_cast<F>(a); }
static inline I as_int(F a) { return reinterpret_cast<I>(a); }
static inline I load_int(const void* p) { I a; std::memcpy(&a, p, sizeof a); return a; }
static inline void store_int(void* p, I a) { std::memcpy(p, &a, sizeof a); }
static inline I set_int(int32_t a) { return I{a, a, a, a}; }
template <int n> static inline I shift_left(I a) { return reinterpret_cast<I>(reinterpret_cast<U>(a) << n); }
template <int n> static inline I shift_right(I a) { return reinterpret_cast<I>(reinterpret_cast<U>(a) >> n); }
static inline F abs(F a) { return as_float(as_int(a) & 0x7fffffff); }
// Adding 1.5 * 2^23 leaves no room for a fraction; exact for |a| < 2^22, which is all the kernels ask for.
static inline F round(F a) { return (a + 12582912.0f) - 12582912.0f; }
static inline F to_float(I a) { return __builtin_convertvector(a, F); }
static inline I to_int(F a) { return __builtin_convertvector(round(a), I); }
static inline I count_lanes(I counts, Mask m) { return counts - m; }
static inline float reduce_add(F a) {
  float v[kLanes];
  store(v, a);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}
static inline float reduce_max(F a) {
  float v[kLanes];
  store(v, a);
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
  return best;
}

#endif

static inline float first_of(F a) { return a[0]; }

// Into L2. Not by intrinsic on x86: GCC takes a function that only prefetches for one without effects, and drops calls.
static inline void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

// kLanes fp16 values, subnormal ones too, exactly.
static inline F load_half(const void* p) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  uint16_t half[kLanes];
  std::memcpy(half, p, sizeof half);
  I wide;
  for (int l = 0; l < kLanes; l++) wide[l] = half[l];
  // The exponent's bias is 15 in fp16 and 127 in float32: a product with 2^112 moves it, whatever the exponent is.
  const F magnitude = as_float(shift_left<13>(wide & 0x7fff)) * set(0x1p112f);
  return as_float(as_int(magnitude) | shift_left<16>(wide & 0x8000));
#endif
}

constexpr int kPanel = kLanes * kVectors;

// With AVX2's 16 registers GCC moves products of different steps past each other until the sums of a tile no longer fit,
// and then stores and loads them; this keeps it from that. int4 products take two thirds of the time with it.
template <class Vector>
static inline void keep_in_registers([[maybe_unused]] Vector (&sums)[kVectors]) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  asm volatile("" : "+x"(sums[0]), "+x"(sums[1]));
#endif
}

// 2^n for whole n in [-126, 127].
static inline F power_of_two(F n) { return as_float(shift_left<23>(to_int(n) + 127)); }

// exp to about one unit in the last place (Cephes' expf); exactly 0 below -87.3, exactly 1 at 0, NaN for NaN (the order
// of the operands sees to that).
static inline F exp(F x) {
  const Mask tiny = less(x, set(-87.3f));
  x = min(set(88.0f), max(set(-87.3f), x));
  const F n = round(x * set(1.44269504088896341f));
  F r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r) + set(1.0f);
  return select(tiny, set(0.0f), p * power_of_two(n));
}

// tanh (Cephes' tanhf): a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
static inline F tanh(F x) {
  const F z = x * x, a = abs(x);
  F p = set(-5.70498872745e-3f);
  p = fma(p, z, set(2.06390887954e-2f));
  p = fma(p, z, set(-5.37397155531e-2f));
  p = fma(p, z, set(1.33314422036e-1f));
  p = fma(p, z, set(-3.33332819422e-1f));
  const F near = fma(p * z, x, x);
  const F far = set(1.0f) - set(2.0f) / (exp(a + a) + set(1.0f));
  const F signed_far = select(less(x, set(0.0f)), set(0.0f) - far, far);
  return select(less(a, set(0.625f)), near, signed_far);
}

// Round to nearest even, as every conversion to bfloat16 here does.
static inline uint16_t to_bf16(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // stays a NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float from_bf16(uint16_t a) {
  const uint32_t bits = static_cast<uint32_t>(a) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline int32_t sum_lanes(I a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(raw(a));
#else
  int32_t total = 0;
  for (int l = 0; l < kLanes; l++) total += a[l];
  return total;
#endif
}

// The lanes that are not below the bound, a bit each.
static inline uint32_t reaching(F a, float bound) { return ~bits(less(a, set(bound))) & ((1u << kLanes) - 1); }

// Writes first + the number of each bit that is set, ascending; what follows them, up to kLanes values, is undefined.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
static inline void store_set_bits(uint32_t set, int32_t first, int32_t* to) {
  const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), number);
  store_int(to, lanes(packed) + first);
}
#else
struct SetBits {
  uint8_t number[1 << kLanes][kLanes] = {};
  constexpr SetBits() {
    for (int set = 0; set < 1 << kLanes; set++)
      for (int bit = 0, count = 0; bit < kLanes; bit++)
        if (set >> bit & 1) number[set][count++] = static_cast<uint8_t>(bit);
  }
};
static constexpr SetBits kSetBits;
static inline void store_set_bits(uint32_t set, int32_t first, int32_t* to) {
  const uint8_t* number = kSetBits.number[set];
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(number));
  store_int(to, lanes(_mm256_cvtepu8_epi32(bytes)) + first);
#else
  for (int l = 0; l < kLanes; l++) to[l] = first + number[l];
#endif
}
#endif

}  // namespace outrider::OUTRIDER_ISA
