// Rows of logits: the largest entry, and scores for Gumbel-max sampling (outrider.sampling.rng defines the random numbers).
#pragma once

#include "simd.hpp"
#include "splitmix.hpp"

namespace outrider::OUTRIDER_ISA {

// Natural logarithm of positive normal numbers, to about one unit in the last place (Cephes' logf).
static inline F log(F x) {
  const I bits = as_int(x);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)): shift the exponent's boundary from 1 to sqrt(1/2).
  const I moved = bits - 0x3f3504f3;
  const F e = to_float(shift_right<23>(moved + 0x3f800000) - 127);
  const F m = as_float((moved & 0x007fffff) + 0x3f3504f3) - set(1.0f);
  F p = set(7.0376836292e-2f);
  p = fma(p, m, set(-1.1514610310e-1f));
  p = fma(p, m, set(1.1676998740e-1f));
  p = fma(p, m, set(-1.2420140846e-1f));
  p = fma(p, m, set(1.4249322787e-1f));
  p = fma(p, m, set(-1.6668057665e-1f));
  p = fma(p, m, set(2.0000714765e-1f));
  p = fma(p, m, set(-2.4999993993e-1f));
  p = fma(p, m, set(3.3333331174e-1f));
  const F z = m * m;
  F y = fma(p, z * m, e * set(-2.12194440e-4f));
  y = fma(z, set(-0.5f), y);
  return fma(e, set(0.693359375f), m + y);
}

// The largest of n >= 1 numbers, and the index of its first occurrence.
static int64_t find_max(const float* x, int64_t n, float* largest) {
  float best = x[0];
  int64_t i = 0;
  if (n >= kLanes) {
    const F first = load(x);
    F most[4] = {first, first, first, first};  // four chains, since each comparison waits for the one before it
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      for (int v = 0; v < 4; v++) most[v] = max(load(x + i + v * kLanes), most[v]);
    for (; i + kLanes <= n; i += kLanes) most[0] = max(load(x + i), most[0]);
    best = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
  }
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  *largest = best;
  for (i = 0; i + kLanes <= n; i += kLanes)
    for (uint32_t hits = reaching(load(x + i), best); hits; hits &= hits - 1)
      if (const int64_t index = i + __builtin_ctz(hits); x[index] == best) return index;
  for (; i < n; i++)
    if (x[i] == best) return i;
  return 0;
}

// Words of kLanes tokens (ids, or first, first + 1, ...) without the mixer's last step, which changes a word by less than
// one part in 2^30: float32 does not show it. Returns the words' high 24 bits.
#if defined(__AVX512DQ__)
static inline F words_of(uint64_t key, uint64_t first, const int64_t* ids, uint64_t (&words)[kLanes]) {
  const __m512i steps = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8);
  __m256i high[2];
  for (int h = 0; h < 2; h++) {
    __m512i token = ids ? _mm512_add_epi64(_mm512_loadu_si512(ids + 8 * h), _mm512_set1_epi64(1))
                        : _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + 8 * h)), steps);
    token = _mm512_mullo_epi64(token, _mm512_set1_epi64(static_cast<int64_t>(kGamma)));
    __m512i w = _mm512_add_epi64(token, _mm512_set1_epi64(static_cast<int64_t>(key)));
    w = _mm512_mullo_epi64(_mm512_xor_si512(w, _mm512_srli_epi64(w, 30)), _mm512_set1_epi64(static_cast<int64_t>(kMix1)));
    w = _mm512_mullo_epi64(_mm512_xor_si512(w, _mm512_srli_epi64(w, 27)), _mm512_set1_epi64(static_cast<int64_t>(kMix2)));
    _mm512_store_si512(words + 8 * h, w);
    high[h] = _mm512_cvtepi64_epi32(_mm512_srli_epi64(w, 40));
  }
  return _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(high[0]), high[1], 1));
}
#elif defined(__AVX2__)
// The low 64 bits of products, which AVX2 has no instruction for.
static inline __m256i multiply_words(__m256i a, uint64_t factor) {
  const __m256i low = _mm256_set1_epi64x(static_cast<int64_t>(factor & 0xffffffff));
  const __m256i high = _mm256_set1_epi64x(static_cast<int64_t>(factor >> 32));
  const __m256i crossed = _mm256_add_epi64(_mm256_mul_epu32(a, high), _mm256_mul_epu32(_mm256_srli_epi64(a, 32), low));
  return _mm256_add_epi64(_mm256_mul_epu32(a, low), _mm256_slli_epi64(crossed, 32));
}
static inline F words_of(uint64_t key, uint64_t first, const int64_t* ids, uint64_t (&words)[kLanes]) {
  const __m256i steps = _mm256_setr_epi64x(1, 2, 3, 4);
  __m256i word[2];
  for (int h = 0; h < 2; h++) {
    const __m256i token =
        ids ? _mm256_add_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + 4 * h)), _mm256_set1_epi64x(1))
            : _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + 4 * h)), steps);
    __m256i w = _mm256_add_epi64(multiply_words(token, kGamma), _mm256_set1_epi64x(static_cast<int64_t>(key)));
    w = multiply_words(_mm256_xor_si256(w, _mm256_srli_epi64(w, 30)), kMix1);
    word[h] = multiply_words(_mm256_xor_si256(w, _mm256_srli_epi64(w, 27)), kMix2);
    _mm256_store_si256(reinterpret_cast<__m256i*>(words + 4 * h), word[h]);
  }
  // The low 32 bits of w >> 40, in order.
  const __m256 both = _mm256_shuffle_ps(reinterpret_cast<__m256>(_mm256_srli_epi64(word[0], 40)),
                                        reinterpret_cast<__m256>(_mm256_srli_epi64(word[1], 40)), 0x88);
  return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(reinterpret_cast<__m256i>(both), 0xd8));
}
#else
static inline F words_of(uint64_t key, uint64_t first, const int64_t* ids, uint64_t (&words)[kLanes]) {
  alignas(64) int32_t high[kLanes];
  for (int l = 0; l < kLanes; l++) {
    words[l] = splitmix_rounds(key + ((ids ? static_cast<uint64_t>(ids[l]) : first + l) + 1) * kGamma);
    high[l] = static_cast<int32_t>(words[l] >> 40);
  }
  return to_float(load_int(high));
}
#endif

// Gumbel values of words, of which `high` are the high 24 bits.
static inline F gumbel_of(const uint64_t (&words)[kLanes], F high) {
  alignas(64) int32_t middle[kLanes], lowest[kLanes];
  for (int l = 0; l < kLanes; l++) {
    middle[l] = static_cast<int32_t>(words[l] >> 16 & 0xffffff);
    lowest[l] = static_cast<int32_t>(words[l] & 0xffff);
  }
  const F tiny = fma(to_float(load_int(middle)), set(0x1p-48f), (to_float(load_int(lowest)) + set(0.5f)) * set(0x1p-64f));
  const F u = min(fma(high, set(0x1p-24f), tiny), set(1.0f - 0x1p-24f));
  // -log(1 - u) with the relative precision of u: u / (1 - rest) corrects for the rounding of rest = 1 - u.
  const F rest = set(1.0f) - u, lost = set(1.0f) - rest;
  const Mask plain = less(lost, set(0x1p-23f));
  const F exponential = select(plain, u, (set(0.0f) - log(rest)) * (u / select(plain, set(1.0f), lost)));
  return set(0.0f) - log(exponential);
}

// At least 2^n, for n in [-127, 1]: the line between its values at whole n. 0 at -127.
static inline F power_bound(F n) { return as_float(to_int(fma(n, set(0x1p23f), set(127.0f * 0x1p23f)))); }

// scores[i] = x[i] / temperature + a float32 Gumbel value of (key, token), token = ids[i] or first + i. Gumbel values
// above -1.9 have an error below 1e-5, smaller ones of up to 1. Returns the largest score; *peak is the largest
// x[i] / temperature, NaN where there is NaN or +inf among the logits. A score that is more than 1 below the largest
// may be -inf instead: a Gumbel value -log(-log(1 - u)) is at most -log(u), so nearly always the word's high bits, which
// are a lower bound of u, show that a score cannot reach the largest one so far, and both logarithms are spared.
static float gumbel_scores(const float* x, int64_t n, float temperature, uint64_t key, uint64_t first,
                           const int64_t* ids, float* scores, float* peak) {
  constexpr float kSlack = 1.2f;  // twice the error of a score, and of what is computed here
  float best = -INFINITY;
  F highest = set(best);
  bool invalid = false;
  const bool divided = temperature != 1.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    alignas(64) float logit[kLanes], result[kLanes];
    alignas(64) int64_t token[kLanes];
    alignas(64) uint64_t words[kLanes];
    const float* from = x + i;
    const int64_t* named = ids ? ids + i : nullptr;
    if (width < kLanes) {
      for (int l = 0; l < kLanes; l++) {
        logit[l] = l < width ? from[l] : -INFINITY;
        if (ids) token[l] = named[l < width ? l : 0];
      }
      from = logit;
      if (ids) named = token;
    }
    const F high = words_of(key, first + i, named, words);
    const F given = load(from), scaled = divided ? given / set(temperature) : given;
    highest = max(scaled, highest);
    invalid |= reaching(given, INFINITY) != 0;
    const F exponent = (scaled - set(best - kSlack)) * set(1.44269504088896341f);
    const F most = power_bound(max(min(exponent, set(1.0f)), set(-127.0f)));
    F score = set(-INFINITY);
    if (bits(less(high * set(0x1p-24f), most))) {
      score = scaled + gumbel_of(words, high);
      const float largest = reduce_max(score);
      best = largest > best ? largest : best;
    }
    if (width == kLanes) {
      store(scores + i, score);
    } else {
      store(result, score);
      std::memcpy(scores + i, result, width * sizeof(float));
    }
  }
  *peak = invalid ? NAN : reduce_max(highest);
  return best;
}

}  // namespace outrider::OUTRIDER_ISA
