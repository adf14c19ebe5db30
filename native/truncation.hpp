// Truncation of one row of logits by top-k, top-p and min-p.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace outrider {

// Keep at most the `top_k` most probable tokens; of these the fewest whose probability reaches `top_p`; of these the
// ones at least `min_p` times as probable as the most probable one.
struct Truncation {
  int64_t top_k = INT64_MAX;
  double top_p = 1.0, min_p = 0.0;
};

// Whether there is NaN or +inf among the logits (-inf is allowed: a masked token).
bool has_nan_or_inf(const float* logits, int64_t n);

// A column of a row. Sorts by descending logit; ties by ascending column.
struct Candidate {
  float logit;
  int64_t column;
  bool operator<(const Candidate& other) const {
    return logit != other.logit ? logit > other.logit : column < other.column;
  }
};

// The last candidate, in sorted order, that truncation keeps: all candidates up to it are kept. The logits are those
// after temperature, without NaN or +inf.
Candidate last_kept(const Kernels& kernels, const float* logits, int64_t n, const Truncation& options);
// The columns of all candidates up to `last`, ascending.
std::vector<int64_t> kept_columns(const Kernels& kernels, const float* logits, int64_t n, const Candidate& last);

}  // namespace outrider
