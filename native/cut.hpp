// What top-k, top-p and min-p leave of a row of logits.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace outrider {

// What is left of a law: at most `top_k` of the likeliest tokens, of these the fewest whose mass reaches `top_p`, of
// these the ones at least `min_p` times as likely as the likeliest.
struct Limits {
  int64_t top_k = INT64_MAX;
  double top_p = 1.0, min_p = 0.0;
};

// Whether there is NaN or +inf among the logits.
bool damaged(const float* x, int64_t n);

// A column of a row, in the order of likelihood: the lowest columns first where logits are equal.
struct Place {
  float value;
  int64_t column;
  bool operator<(const Place& other) const {
    return value != other.value ? value > other.value : column < other.column;
  }
};

// The last column that limits leave of a row of logits (after temperature): all up to it are left. Not of damaged logits.
Place last_kept(const Kernels& kernels, const float* x, int64_t n, const Limits& limits);
// All columns up to that one, ascending.
std::vector<int64_t> columns_to(const Kernels& kernels, const float* x, int64_t n, const Place& last);

}  // namespace outrider
