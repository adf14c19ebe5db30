#include "truncation.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "sampler.hpp"

namespace outrider {

namespace {

constexpr int64_t kBlocks = 16;  // top-k: each maximum of kBlocks values bounds the k-th largest value
// top-p: a histogram of probability by distance from the largest logit; the last bin takes everything further down.
constexpr int kBinsPerUnit = 32, kBins = 24 * kBinsPerUnit + 1;
// top-p: try these distances from the largest logit first, each with at most one column in kShortRatio above it.
constexpr float kDistances[] = {12, 8, 5, 3};
constexpr int64_t kShortRatio = 32;
constexpr double kAlmostOne = 1.0 - 4 * 0x1p-23;  // a sum that misses p only by the rounding of logits has reached it

int bin_of(float value, float peak) {
  return static_cast<int>(std::min((peak - value) * kBinsPerUnit, static_cast<float>(kBins - 1)));
}

// The sum of exp(x - peak).
double exp_sum(const Kernels& k, const float* x, int64_t n, float peak) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += kPiece) sum += k.exp_sum(x + i, std::min(kPiece, n - i), 1.0f, peak, 1.0f, nullptr);
  return sum;
}

// The sum of exp(x - peak) in each bin. Several partial sums a bin, so that additions do not wait for each other.
std::array<double, kBins> exp_sum_by_bin(const Kernels& k, const float* x, int64_t n, float peak) {
  constexpr int kSums = 4;
  std::array<std::array<double, kSums>, kBins> part{};
  float weight[kPiece];
  int bin[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = std::min(kPiece, n - first);
    k.exp_sum(x + first, count, 1.0f, peak, 1.0f, weight);
    for (int64_t i = 0; i < count; i++) bin[i] = bin_of(x[first + i], peak);
    for (int64_t i = 0; i < count; i++) part[bin[i]][i % kSums] += weight[i];
  }
  std::array<double, kBins> sum;
  for (int b = 0; b < kBins; b++) sum[b] = (part[b][0] + part[b][1]) + (part[b][2] + part[b][3]);
  return sum;
}

// Sorts the candidates and returns the first at which the sum of exp(logit - peak) reaches `goal`; the last candidate
// where the sum of all is smaller.
Candidate last_needed(std::vector<Candidate> some, float peak, double goal) {
  std::sort(some.begin(), some.end());
  double sum = 0.0;
  size_t count = 0;
  do sum += std::exp(static_cast<double>(some[count++].logit) - peak);
  while (count < some.size() && sum < goal);
  return some[count - 1];
}

// The same for a whole row without sorting it: a histogram tells the bin of that candidate; only this bin is sorted.
Candidate last_of_row(const Kernels& k, const float* x, int64_t n, float peak, double goal) {
  const std::array<double, kBins> sum = exp_sum_by_bin(k, x, n, peak);
  double above = 0.0;
  int last = 0, lowest = kBins - 1;
  while (sum[lowest] <= 0.0) lowest--;  // the peak's bin has some
  while (last < lowest && above + sum[last] < goal) above += sum[last++];
  std::vector<Candidate> edge;
  int bin[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = std::min(kPiece, n - first);
    for (int64_t i = 0; i < count; i++) bin[i] = bin_of(x[first + i], peak);
    for (int64_t i = 0; i < count; i++)
      if (bin[i] == last) edge.push_back({x[first + i], first + i});
  }
  return last_needed(std::move(edge), peak, goal - above);
}

// The same with p of the row's whole sum as the goal (top-p). Where a few large logits reach it, only they are
// searched.
Candidate last_of_nucleus(const Kernels& k, const float* x, int64_t n, float peak, double p) {
  const double goal = p * exp_sum(k, x, n, peak);
  for (float distance : kDistances) {
    const float bound = peak - distance;
    const int64_t count = k.count_from(x, n, bound);
    if (count * kShortRatio > n) continue;
    const Scratch<int32_t> found_at = scratch<int32_t>(n);
    const Scratch<float> values = scratch<float>(count);
    k.collect(x, n, bound, found_at.get());
    for (int64_t i = 0; i < count; i++) values[i] = x[found_at[i]];
    if (exp_sum(k, values.get(), count, peak) < goal) break;
    Candidate last = last_of_row(k, values.get(), count, peak, goal);
    last.column = found_at[last.column];
    return last;
  }
  return last_of_row(k, x, n, peak, goal);
}

// All candidates whose logit reaches the bound.
std::vector<Candidate> candidates_from(const Kernels& k, const float* x, int64_t n, float bound) {
  const Scratch<int32_t> found_at = scratch<int32_t>(n);
  const int64_t count = k.collect(x, n, bound, found_at.get());
  std::vector<Candidate> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) found[i] = {x[found_at[i]], found_at[i]};
  return found;
}

// The `count` largest candidates; the smallest of them is the last element.
std::vector<Candidate> largest(const Kernels& k, const float* x, int64_t n, int64_t count) {
  const int64_t length = n / kBlocks;
  float bound = kMaskedLogit;
  if (length >= 4 * count) {  // at least `count` values of the row reach the count-th largest maximum
    std::vector<float> maxima(static_cast<size_t>(length));
    k.fold_max(x, kBlocks, length, maxima.data());
    std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<float>());
    bound = maxima[count - 1];
  }
  std::vector<Candidate> found = candidates_from(k, x, n, bound);
  std::nth_element(found.begin(), found.begin() + count - 1, found.end());
  found.resize(static_cast<size_t>(count));
  return found;
}

// The last candidate at least `min_p` times as probable as the most probable one.
Candidate last_above_min_p(const Kernels& k, const float* x, int64_t n, float peak, double min_p) {
  Candidate last{peak, 0};
  for (const Candidate& candidate : candidates_from(k, x, n, peak + static_cast<float>(std::log(min_p)) - 0.1f))
    if (std::exp(static_cast<double>(candidate.logit) - peak) >= min_p) last = std::max(last, candidate);
  return last;
}

}  // namespace

bool has_nan_or_inf(const float* x, int64_t n) {
  int found = 0;  // no early exit, so that the loop vectorises
  for (int64_t i = 0; i < n; i++) found |= !(x[i] < std::numeric_limits<float>::infinity());
  return found;
}

Candidate last_kept(const Kernels& k, const float* x, int64_t n, const Truncation& options) {
  float peak;
  const int64_t largest_column = k.find_max(x, n, &peak);
  if (options.top_k <= 1) return {peak, largest_column};
  Candidate last{kMaskedLogit, n};  // keeps all
  if (peak == kMaskedLogit) return last;
  if (options.top_k < n) {
    std::vector<Candidate> found = largest(k, x, n, options.top_k);
    last = found.back();
    if (options.top_p < 1.0) {
      double sum = 0.0;
      for (const Candidate& candidate : found) sum += std::exp(static_cast<double>(candidate.logit) - peak);
      last = last_needed(std::move(found), peak, options.top_p * kAlmostOne * sum);
    }
  } else if (options.top_p < 1.0) {
    last = last_of_nucleus(k, x, n, peak, options.top_p * kAlmostOne);
  }
  if (options.min_p > 0.0) last = std::min(last, last_above_min_p(k, x, n, peak, options.min_p));
  return last;
}

std::vector<int64_t> kept_columns(const Kernels& k, const float* x, int64_t n, const Candidate& last) {
  const Scratch<int32_t> found_at = scratch<int32_t>(n);
  const int64_t count = k.collect(x, n, last.logit, found_at.get());
  std::vector<int64_t> columns;
  columns.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++)
    if (x[found_at[i]] > last.logit || found_at[i] <= last.column) columns.push_back(found_at[i]);
  return columns;
}

}  // namespace outrider
