#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "splitmix.hpp"

namespace outrider {

namespace {

double gumbel(uint64_t key, uint64_t token) {
  const double word = static_cast<double>(splitmix(key + (token + 1) * kGamma));
  const double u = std::min((word + 0.5) * 0x1p-64, 1.0 - 0x1p-53);
  return -std::log(-std::log1p(-u));
}

// Smaller scores cannot be the exact largest. The error of a score is 1e-5 plus the rounding of a sum, but up to 1 for
// Gumbel values below -1.9, which matters only where some logit is that far above the best score.
float lowest_score(float best, float peak) { return best - (peak > best + 1.8f ? 2.5f : 1e-4f) - std::fabs(best) * 5e-7f; }

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
    throw std::invalid_argument(
        "logits must be numbers, got NaN or +inf, or -inf for every token; the weights or the input are damaged");
}

bool try_gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* temperatures,
                       const int64_t* ids, int64_t* out, bool parallel) {
  const Kernels& k = find_kernels();
  const int64_t pieces = piece_count(width);
  std::vector<ScoredPiece> scored(rows * pieces);
  const auto temperature = [&](int64_t row) { return temperatures ? temperatures[row] : 1.0f; };
  const auto ids_of = [&](int64_t row) { return ids ? ids + row * width : nullptr; };
  for_pieces(parallel, rows, width, [&](int64_t row, int64_t first, int64_t count, int64_t piece) {
    scored[piece].score(k, logits + row * width, first, count, temperature(row), keys[row], ids_of(row));
  });
  for (int64_t row = 0; row < rows; row++) {
    out[row] = winner(scored.data() + row * pieces, pieces, logits + row * width, temperature(row), keys[row],
                      ids_of(row));
    if (out[row] < 0) return false;
  }
  return true;
}

void ScoredPiece::score(const Kernels& kernels, const float* logits, int64_t first, int64_t count, float temperature,
                        int64_t key, const int64_t* ids) {
  float scores[kPiece];
  candidates.clear();
  best = kernels.gumbel_scores(logits + first, count, temperature, static_cast<uint64_t>(key),
                               static_cast<uint64_t>(first), ids ? ids + first : nullptr, scores, &peak);
  if (std::isinf(best)) return;  // all logits of this piece are masked
  int32_t reached[kPiece];
  const int64_t found = kernels.collect(scores, count, lowest_score(best, peak), reached);
  for (int64_t i = 0; i < found; i++) candidates.push_back({first + reached[i], scores[reached[i]]});
}

int64_t winner(const ScoredPiece* pieces, int64_t count, const float* logits, float temperature, int64_t key,
               const int64_t* ids) {
  float best = kMaskedLogit, peak = kMaskedLogit;
  for (const ScoredPiece* piece = pieces; piece < pieces + count; piece++) {
    if (!(piece->peak < std::numeric_limits<float>::infinity())) return -1;
    best = std::max(best, piece->best);
    peak = std::max(peak, piece->peak);
  }
  const float bound = lowest_score(best, peak);
  double largest = -std::numeric_limits<double>::infinity();
  int64_t column = -1;
  for (const ScoredPiece* piece = pieces; piece < pieces + count; piece++)
    for (const ScoredPiece::Column& candidate : piece->candidates) {
      if (candidate.score < bound) continue;
      const uint64_t token = static_cast<uint64_t>(ids ? ids[candidate.column] : candidate.column);
      const double exact = static_cast<double>(logits[candidate.column] / temperature) +
                           gumbel(static_cast<uint64_t>(key), token);
      if (exact > largest) {
        largest = exact;
        column = candidate.column;
      }
    }
  return column;
}

}  // namespace outrider
