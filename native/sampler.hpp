// Choosing tokens from rows of logits (argmax and Gumbel-max sampling), on all threads where the rows are large.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "threadpool.hpp"

namespace outrider {

constexpr float kMaskedLogit = -std::numeric_limits<float>::infinity();  // of a token with probability 0
constexpr int64_t kPiece = 4096;  // columns per piece: pieces are summed separately and merged in order
constexpr int64_t kParallelThreshold = 65536;  // logits below which waking other threads costs more than it saves

// An uninitialised array: its owner writes every element before reading it.
template <class T>
using Scratch = std::unique_ptr<T[]>;
template <class T>
Scratch<T> scratch(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(n));
}

constexpr int64_t piece_count(int64_t width) { return (width + kPiece - 1) / kPiece; }

// Calls job(row, first column, columns, piece) for every piece of every row; on the thread pool if `parallel` is set
// and there is enough to do.
template <class Job>
void for_pieces(bool parallel, int64_t rows, int64_t width, Job&& job) {
  const int64_t pieces = piece_count(width);
  const auto one = [&](int64_t i) {
    const int64_t first = i % pieces * kPiece;
    job(i / pieces, first, std::min(kPiece, width - first), i);
  };
  if (parallel && rows * width >= kParallelThreshold) {
    const auto pool = shared_pool();
    pool->run([&](int thread) { pool->parallel_for(thread, rows * pieces, one); });
  } else {
    for (int64_t i = 0; i < rows * pieces; i++) one(i);
  }
}

// The column of each row's largest logit, the lowest on ties. [rows, width] -> [rows]
void argmax(const float* logits, int64_t rows, int64_t width, int64_t* out);

// Gumbel-max sampling of one row in pieces, each scored by any thread: the columns that could win. Scores are float32;
// `winner` compares those near the largest in float64.
struct ScoredPiece {
  struct Column {
    int64_t column;
    float score;
  };
  float best = kMaskedLogit;  // largest score
  float peak = kMaskedLogit;  // largest logit / temperature; NaN where there is NaN or +inf among the logits
  std::vector<Column> candidates;

  // Scores columns [first, first + count) of a row, at most kPiece; the arguments are those of `gumbel_argmax`.
  void score(const Kernels& kernels, const float* logits, int64_t first, int64_t count, float temperature, int64_t key,
             const int64_t* ids);
};

// The column drawn from a row, whose pieces are given in order; -1 where there is NaN or +inf among its
// logits / temperature, or nothing but -inf.
int64_t winner(const ScoredPiece* pieces, int64_t count, const float* logits, float temperature, int64_t key,
               const int64_t* ids);

// The column of each row's largest logit / temperature + Gumbel value, computed in float64 as outrider.sampling.rng defines
// it; the lowest column on ties. ids [rows, width]: the token of each column, null where column v is token v.
// temperatures: null for 1. Throws std::invalid_argument where `winner` finds none. `parallel`: as for `for_pieces`.
void gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* temperatures,
                   const int64_t* ids, int64_t* out, bool parallel = true);
// The same, false instead of an exception: a job of the thread pool must not throw.
bool try_gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* temperatures,
                       const int64_t* ids, int64_t* out, bool parallel);

}  // namespace outrider
