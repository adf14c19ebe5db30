#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"
#include "splitmix.hpp"

namespace outrider {

namespace {

double gumbel(uint64_t key, uint64_t token) {
  const double word = static_cast<double>(splitmix(key + (token + 1) * kGamma));
  const double u = std::min((word + 0.5) * 0x1p-64, 1.0 - 0x1p-53);
  return -std::log(-std::log1p(-u));
}

struct ScoredColumn {
  int64_t column;
  float score;
};

// Approximate scores (float32) of a piece of a row: those that could be the largest are computed again in float64.
struct PieceScores {
  float best = -std::numeric_limits<float>::infinity();  // largest score
  float peak = best;                                     // largest logit / temperature
  std::vector<ScoredColumn> candidates;

  // Smaller scores cannot be the exact largest. The error of a score is 1e-5 plus the rounding of a sum, but up to 1
  // for Gumbel values below -1.9, which matters only where some logit is that far above the best score.
  float bound() const { return best - (peak > best + 1.8f ? 2.5f : 1e-4f) - std::fabs(best) * 5e-7f; }
};

}  // namespace

void argmax(const float* logits, int64_t rows, int64_t width, int64_t* out) {
  const Kernels& k = find_kernels();
  const int64_t pieces = piece_count(width);
  std::vector<float> best(rows * pieces);
  std::vector<int64_t> column(rows * pieces);
  for_pieces(true, rows, width, [&](int64_t row, int64_t first, int64_t count, int64_t piece) {
    column[piece] = first + k.find_max(logits + row * width + first, count, &best[piece]);
  });
  for (int64_t row = 0; row < rows; row++) {
    const auto begin = best.begin() + row * pieces;
    out[row] = column[std::max_element(begin, begin + pieces) - best.begin()];
  }
}

void gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* temperatures,
                   const int64_t* ids, int64_t* out, bool parallel) {
  if (!try_gumbel_argmax(logits, rows, width, keys, temperatures, ids, out, parallel))
    throw std::invalid_argument("logits must be numbers, got NaN or +inf; the weights or the input are damaged");
}

bool try_gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* temperatures,
                       const int64_t* ids, int64_t* out, bool parallel) {
  const Kernels& k = find_kernels();
  const int64_t pieces = piece_count(width);
  std::vector<PieceScores> scored(rows * pieces);
  const auto temperature = [&](int64_t row) { return temperatures ? temperatures[row] : 1.0f; };
  for_pieces(parallel, rows, width, [&](int64_t row, int64_t first, int64_t count, int64_t piece) {
    PieceScores& part = scored[piece];
    float scores[kPiece];
    part.best = k.gumbel_scores(logits + row * width + first, count, temperature(row), static_cast<uint64_t>(keys[row]),
                                static_cast<uint64_t>(first), ids ? ids + row * width + first : nullptr, scores,
                                &part.peak);
    if (std::isinf(part.best)) return;  // all logits of this piece are masked
    const float bound = part.bound();
    int32_t reached[kPiece];
    const int64_t found = k.collect(scores, nullptr, 0.0f, count, bound, reached);
    for (int64_t i = 0; i < found; i++) part.candidates.push_back({first + reached[i], scores[reached[i]]});
  });
  for (int64_t row = 0; row < rows; row++) {
    PieceScores whole;
    for (int64_t p = row * pieces; p < (row + 1) * pieces; p++) {
      if (std::isnan(scored[p].peak)) return false;
      whole.best = std::max(whole.best, scored[p].best);
      whole.peak = std::max(whole.peak, scored[p].peak);
    }
    const float bound = whole.bound();
    double largest = -std::numeric_limits<double>::infinity();
    out[row] = 0;
    for (int64_t p = row * pieces; p < (row + 1) * pieces; p++)
      for (const ScoredColumn& candidate : scored[p].candidates) {
        if (candidate.score < bound) continue;
        const int64_t at = row * width + candidate.column;
        const uint64_t token = static_cast<uint64_t>(ids ? ids[at] : candidate.column);
        const double exact =
            static_cast<double>(logits[at] / temperature(row)) + gumbel(static_cast<uint64_t>(keys[row]), token);
        if (exact > largest) {
          largest = exact;
          out[row] = candidate.column;
        }
      }
  }
  return true;
}

}  // namespace outrider
