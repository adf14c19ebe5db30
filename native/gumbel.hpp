// Rows of logits: the largest entry, and scores for Gumbel-max sampling (outrider.noise defines the random numbers).
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
    F most = load(x);
    for (i = kLanes; i + kLanes <= n; i += kLanes) most = max(load(x + i), most);
    best = reduce_max(most);
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

#if defined(__AVX512DQ__)
// The high 24, middle 24 and low 16 bits of the words of kLanes tokens, without the mixer's last step (see below).
static inline void words_of_vector(uint64_t key, uint64_t first, const int64_t* ids, F* high, F* mid, F* low) {
  __m512i word[2];
  for (int h = 0; h < 2; h++) {
    const __m512i steps = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8);
    __m512i token = ids ? _mm512_add_epi64(_mm512_loadu_si512(ids + 8 * h), _mm512_set1_epi64(1))
                        : _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + 8 * h)), steps);
    token = _mm512_mullo_epi64(token, _mm512_set1_epi64(static_cast<int64_t>(kGamma)));
    __m512i w = _mm512_add_epi64(token, _mm512_set1_epi64(static_cast<int64_t>(key)));
    w = _mm512_mullo_epi64(_mm512_xor_si512(w, _mm512_srli_epi64(w, 30)),
                           _mm512_set1_epi64(static_cast<int64_t>(0xBF58476D1CE4E5B9)));
    word[h] = _mm512_mullo_epi64(_mm512_xor_si512(w, _mm512_srli_epi64(w, 27)),
                                 _mm512_set1_epi64(static_cast<int64_t>(0x94D049BB133111EB)));
  }
  const auto joined = [](__m512i a, __m512i b) {
    const __m512i low_half = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(a));
    return _mm512_cvtepi32_ps(_mm512_inserti64x4(low_half, _mm512_cvtepi64_epi32(b), 1));
  };
  const __m512i bits24 = _mm512_set1_epi64(0xffffff), bits16 = _mm512_set1_epi64(0xffff);
  *high = joined(_mm512_srli_epi64(word[0], 40), _mm512_srli_epi64(word[1], 40));
  *mid = joined(_mm512_and_si512(_mm512_srli_epi64(word[0], 16), bits24),
                _mm512_and_si512(_mm512_srli_epi64(word[1], 16), bits24));
  *low = joined(_mm512_and_si512(word[0], bits16), _mm512_and_si512(word[1], bits16));
}
#endif

// scores[i] = x[i] / temperature + a float32 Gumbel value of (key, token), token = ids[i] or first + i. Gumbel values
// above -1.9 have an error below 1e-5, smaller ones of up to 1. Returns the largest score; *peak is the largest
// x[i] / temperature, NaN where there is NaN or +inf among the logits.
static float gumbel_scores(const float* x, int64_t n, float temperature, uint64_t key, uint64_t first,
                           const int64_t* ids, float* scores, float* peak) {
  F most = set(-INFINITY), highest = most;
  bool invalid = false;
  const bool divided = temperature != 1.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int width = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    alignas(64) float logit[kLanes];
    F high, mid, low;
#if defined(__AVX512DQ__)
    if (width == kLanes) {
      words_of_vector(key, first + i, ids ? ids + i : nullptr, &high, &mid, &low);
      std::memcpy(logit, x + i, sizeof(logit));
    } else
#endif
    {
      alignas(64) uint64_t word[kLanes];
      alignas(64) int32_t part[3][kLanes];
      for (int l = 0; l < kLanes; l++) {
        logit[l] = l < width ? x[i + l] : -INFINITY;
        word[l] = ids ? static_cast<uint64_t>(ids[l < width ? i + l : i]) : first + i + l;
      }
      // The mixer's last step changes a word by less than one part in 2^30, which float32 does not show.
      for (int l = 0; l < kLanes; l++) word[l] = splitmix_rounds(key + (word[l] + 1) * kGamma);
      for (int l = 0; l < kLanes; l++) {
        part[0][l] = static_cast<int32_t>(word[l] >> 40);
        part[1][l] = static_cast<int32_t>(word[l] >> 16 & 0xffffff);
        part[2][l] = static_cast<int32_t>(word[l] & 0xffff);
      }
      high = to_float(load_int(part[0]));
      mid = to_float(load_int(part[1]));
      low = to_float(load_int(part[2]));
    }
    const F tiny = fma(mid, set(0x1p-48f), (low + set(0.5f)) * set(0x1p-64f));
    const F u = min(fma(high, set(0x1p-24f), tiny), set(1.0f - 0x1p-24f));
    // -log(1 - u) with the relative precision of u: u / (1 - rest) corrects for the rounding of rest = 1 - u.
    const F rest = set(1.0f) - u, lost = set(1.0f) - rest;
    const Mask plain = less(lost, set(0x1p-23f));
    const F exponential = select(plain, u, (set(0.0f) - log(rest)) * (u / select(plain, set(1.0f), lost)));
    const F given = load(logit), scaled = divided ? given / set(temperature) : given;
    const F score = scaled - log(exponential);
    highest = max(scaled, highest);
    most = max(score, most);
    invalid |= reaching(given, INFINITY) != 0;
    if (width == kLanes) {
      store(scores + i, score);
    } else {
      store(logit, score);
      std::memcpy(scores + i, logit, width * sizeof(float));
    }
  }
  *peak = invalid ? NAN : reduce_max(highest);
  return reduce_max(most);
}

}  // namespace outrider::OUTRIDER_ISA
