// One draft, drawn from a row of logits alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.hpp"
#include "sampler.hpp"
#include "truncation.hpp"

namespace outrider {

constexpr float kCold = 1e-3f;  // a temperature under which logits / temperature may overflow

inline float sigmoid(double z) {
  const double small = std::exp(-std::fabs(z));  // never overflows
  return static_cast<float>((z >= 0 ? 1.0 : small) / (1.0 + small));
}

// Masks what top-k, top-p and min-p leave out of a row of logits / temperature.
inline void mask_truncated(const Kernels& kernels, float* row, int64_t width, const Truncation& options) {
  if (options.top_k >= width && options.top_p >= 1.0 && options.min_p <= 0.0) return;
  const Candidate last = last_kept(kernels, row, width, options);
  for (int64_t i = 0; i < width; i++)
    if (row[i] < last.logit || (i > last.column && row[i] == last.logit)) row[i] = kMaskedLogit;
}

struct DraftRow {
  float* logits;             // [width], left as they are
  int64_t width;
  const int64_t* ids;        // [width] target ids, ascending; null: the columns
  float temperature;         // 0: the largest logit
  Truncation truncation;     // of sampled drafts
  int64_t key;
  float* distribution;       // [width] logits / temperature that the draft is drawn from; null where it is greedy
  int64_t* distribution_ids; // [width]; null where `ids` is
  bool parallel;             // whether the thread pool may be used
};

// The target id drawn, and sigmoid(largest logit - second). -1 for logits that hold NaN or infinity.
inline int64_t draw_draft(const Kernels& kernels, const DraftRow& row, float* confidence) {
  float largest, second;
  const int64_t best = kernels.find_max(row.logits, row.width, &largest);
  if (!std::isfinite(largest)) return -1;
  row.logits[best] = kMaskedLogit;
  kernels.find_max(row.logits, row.width, &second);
  row.logits[best] = largest;
  *confidence = sigmoid(static_cast<double>(largest) - second);
  int64_t drawn = best;
  if (row.distribution) {
    if (row.temperature > 0) {
      const float shift = row.temperature < kCold ? largest : 0.0f;
      for (int64_t v = 0; v < row.width; v++) row.distribution[v] = (row.logits[v] - shift) / row.temperature;
      mask_truncated(kernels, row.distribution, row.width, row.truncation);
      if (!try_gumbel_argmax(row.distribution, 1, row.width, &row.key, nullptr, row.ids, &drawn, row.parallel))
        return -1;
    } else {
      std::fill_n(row.distribution, row.width, kMaskedLogit);
      row.distribution[best] = 0.0f;
    }
    if (row.ids) std::copy_n(row.ids, row.width, row.distribution_ids);
  }
  return row.ids ? row.ids[drawn] : drawn;
}

}  // namespace outrider
