#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"
#include "mix.hpp"

namespace outrider {

namespace {

double gumbel(uint64_t key, uint64_t token) {
  const double word = static_cast<double>(mix64(key + (token + 1) * kGamma));
  const double u = std::min((word + 0.5) * 0x1p-64, 1.0 - 0x1p-53);
  return -std::log(-std::log1p(-u));
}

struct Contender {
  int64_t column;
  float score;
};

struct Race {
  float best = -std::numeric_limits<float>::infinity();
  float peak = best;
  std::vector<Contender> contenders;

  // Below this nobody can win: scores are off by 1e-5 and the rounding of a sum, but by up to 1 where the noise lies
  // under -1.9, which matters only where a logit stands that far above the best score.
  float floor() const { return best - (peak > best + 1.8f ? 2.5f : 1e-4f) - std::fabs(best) * 5e-7f; }
};

}  // namespace

void argmax(const float* logits, int64_t rows, int64_t width, int64_t* out) {
  const Kernels& k = find_kernels();
  const int64_t pieces = piece_count(width);
  std::vector<float> best(rows * pieces);
  std::vector<int64_t> place(rows * pieces);
  for_pieces(true, rows, width, [&](int64_t row, int64_t first, int64_t count, int64_t piece) {
    place[piece] = first + k.find_max(logits + row * width + first, count, &best[piece]);
  });
  for (int64_t row = 0; row < rows; row++) {
    const auto begin = best.begin() + row * pieces;
    out[row] = place[std::max_element(begin, begin + pieces) - best.begin()];
  }
}

void gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* divisors,
                   const int64_t* ids, int64_t* out, bool share) {
  const Kernels& k = find_kernels();
  const int64_t pieces = piece_count(width);
  std::vector<Race> races(rows * pieces);
  const auto divisor = [&](int64_t row) { return divisors ? divisors[row] : 1.0f; };
  for_pieces(share, rows, width, [&](int64_t row, int64_t first, int64_t count, int64_t piece) {
    Race& race = races[piece];
    float scores[kPiece];
    race.best = k.race(logits + row * width + first, count, divisor(row), static_cast<uint64_t>(keys[row]),
                       static_cast<uint64_t>(first), ids ? ids + row * width + first : nullptr, scores, &race.peak);
    if (std::isinf(race.best)) return;  // nothing here has any probability
    const float floor = race.floor();
    for (int64_t i = 0; i < count; i++)
      if (scores[i] >= floor) race.contenders.push_back({first + i, scores[i]});
  });
  for (int64_t row = 0; row < rows; row++) {
    Race whole;
    for (int64_t p = row * pieces; p < (row + 1) * pieces; p++) {
      if (std::isnan(races[p].peak))
        throw std::invalid_argument("logits must be numbers, got NaN or +inf; the weights or the input are damaged");
      whole.best = std::max(whole.best, races[p].best);
      whole.peak = std::max(whole.peak, races[p].peak);
    }
    const float floor = whole.floor();
    double most = -std::numeric_limits<double>::infinity();
    out[row] = 0;
    for (int64_t p = row * pieces; p < (row + 1) * pieces; p++)
      for (const Contender& one : races[p].contenders) {
        if (one.score < floor) continue;
        const int64_t at = row * width + one.column;
        const uint64_t token = static_cast<uint64_t>(ids ? ids[at] : one.column);
        const double exact =
            static_cast<double>(logits[at] / divisor(row)) + gumbel(static_cast<uint64_t>(keys[row]), token);
        if (exact > most) {
          most = exact;
          out[row] = one.column;
        }
      }
  }
}

}  // namespace outrider
