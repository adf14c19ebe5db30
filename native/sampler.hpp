// Choosing tokens from rows of logits, with all threads of the pool where the rows are large.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>

#include "threadpool.hpp"

namespace outrider {

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // a logit without probability
constexpr int64_t kPiece = 4096;          // entries looked at together; sums are merged piece by piece
constexpr int64_t kWorthSharing = 65536;  // entries below which waking other threads costs more than it saves

// Room for numbers that are written before they are read.
template <class T>
using Scratch = std::unique_ptr<T[]>;
template <class T>
Scratch<T> scratch(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(n));
}

constexpr int64_t piece_count(int64_t width) { return (width + kPiece - 1) / kPiece; }

// Calls job(row, first, count, piece) for every piece of every row; with `share` on as many threads as pay.
template <class Job>
void for_pieces(bool share, int64_t rows, int64_t width, Job&& job) {
  const int64_t pieces = piece_count(width);
  const auto one = [&](int64_t i) {
    const int64_t begin = i % pieces * kPiece;
    job(i / pieces, begin, std::min(kPiece, width - begin), i);
  };
  if (share && rows * width >= kWorthSharing) {
    const auto pool = shared_pool();
    pool->run([&](int thread) { pool->deal(thread, rows * pieces, one); });
  } else {
    for (int64_t i = 0; i < rows * pieces; i++) one(i);
  }
}

// Where each row's largest entry first stands. [rows, width] -> [rows]
void argmax(const float* logits, int64_t rows, int64_t width, int64_t* out);

// The column of each row's largest logit / divisor + Gumbel value, as outrider.noise defines it: float64 decides, the
// lowest column on ties. ids [rows, width]: the token of each column, null where column v is token v. divisors: null
// for 1. Throws std::invalid_argument for NaN or +inf. `share`: as for `for_pieces`.
void gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* divisors,
                   const int64_t* ids, int64_t* out, bool share = true);

}  // namespace outrider
