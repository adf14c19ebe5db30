#include "cut.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "sampler.hpp"

namespace outrider {

namespace {

constexpr int64_t kBlocks = 16;  // values summarised by their maximum when few of many are wanted
constexpr int kBinsPerUnit = 32, kBins = 24 * kBinsPerUnit + 1;  // of logits below the largest; the last takes the rest
constexpr float kDepths[] = {12, 8, 5, 3};  // logits below the largest down to which a small nucleus is looked for
constexpr int64_t kNarrow = 32;  // such a nucleus is among at most one column in so many
constexpr double kAlmost = 1.0 - 4 * 0x1p-23;  // a mass that misses p by the rounding of its logits has reached it

int bin_of(float value, float peak) {
  return static_cast<int>(std::min((peak - value) * kBinsPerUnit, static_cast<float>(kBins - 1)));
}

// exp(x - peak), summed.
double mass_of(const Kernels& k, const float* x, int64_t n, float peak) {
  double mass = 0.0;
  for (int64_t i = 0; i < n; i += kPiece) mass += k.exps(x + i, std::min(kPiece, n - i), 1.0f, peak, 1.0f, nullptr);
  return mass;
}

// The mass of each bin of logits below the peak. Several sums a bin, so that additions need not wait for each other.
std::array<double, kBins> masses_by_bin(const Kernels& k, const float* x, int64_t n, float peak) {
  constexpr int kSums = 4;
  std::array<std::array<double, kSums>, kBins> part{};
  float weight[kPiece];
  int bin[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = std::min(kPiece, n - first);
    k.exps(x + first, count, 1.0f, peak, 1.0f, weight);
    for (int64_t i = 0; i < count; i++) bin[i] = bin_of(x[first + i], peak);
    for (int64_t i = 0; i < count; i++) part[bin[i]][i % kSums] += weight[i];
  }
  std::array<double, kBins> mass;
  for (int b = 0; b < kBins; b++) mass[b] = (part[b][0] + part[b][1]) + (part[b][2] + part[b][3]);
  return mass;
}

// The last of the candidates, put in order, that is needed for a mass; the last of all where they have less.
Place last_needed(std::vector<Place> some, float peak, double goal) {
  std::sort(some.begin(), some.end());
  double mass = 0.0;
  size_t count = 0;
  do mass += std::exp(static_cast<double>(some[count++].value) - peak);
  while (count < some.size() && mass < goal);
  return some[count - 1];
}

// The same of a whole row: the mass of narrow bins of logits says in which bin it is; only what lies there is put in
// order.
Place last_of_all(const Kernels& k, const float* x, int64_t n, float peak, double goal) {
  const std::array<double, kBins> mass = masses_by_bin(k, x, n, peak);
  double above = 0.0;
  int last = 0, lowest = kBins - 1;
  while (mass[lowest] <= 0.0) lowest--;  // the peak's bin has some
  while (last < lowest && above + mass[last] < goal) above += mass[last++];
  std::vector<Place> edge;
  int bin[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = std::min(kPiece, n - first);
    for (int64_t i = 0; i < count; i++) bin[i] = bin_of(x[first + i], peak);
    for (int64_t i = 0; i < count; i++)
      if (bin[i] == last) edge.push_back({x[first + i], first + i});
  }
  return last_needed(std::move(edge), peak, goal - above);
}

// The same with p of the row's mass as goal. Where few tokens hold that, only they are looked at.
Place last_of_nucleus(const Kernels& k, const float* x, int64_t n, float peak, double p) {
  const double goal = p * mass_of(k, x, n, peak);
  for (float depth : kDepths) {
    const float bound = peak - depth;
    const int64_t count = k.count_from(x, n, bound);
    if (count * kNarrow > n) continue;
    const Scratch<int32_t> places = scratch<int32_t>(count);
    const Scratch<float> values = scratch<float>(count);
    k.collect(x, nullptr, 0.0f, n, bound, places.get());
    for (int64_t i = 0; i < count; i++) values[i] = x[places[i]];
    if (mass_of(k, values.get(), count, peak) < goal) break;
    Place last = last_of_all(k, values.get(), count, peak, goal);
    last.column = places[last.column];
    return last;
  }
  return last_of_all(k, x, n, peak, goal);
}

std::vector<Place> from(const Kernels& k, const float* x, int64_t n, float bound) {
  const Scratch<int32_t> places = scratch<int32_t>(n);
  const int64_t count = k.collect(x, nullptr, 0.0f, n, bound, places.get());
  std::vector<Place> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) found[i] = {x[places[i]], places[i]};
  return found;
}

// The `count` largest, the last of them at the end.
std::vector<Place> largest(const Kernels& k, const float* x, int64_t n, int64_t count) {
  const int64_t length = n / kBlocks;
  float bound = kNothing;
  if (length >= 4 * count) {  // each block's maximum is a value of the row: `count` of them bound it
    std::vector<float> most(static_cast<size_t>(length));
    k.fold_max(x, kBlocks, length, most.data());
    std::nth_element(most.begin(), most.begin() + count - 1, most.end(), std::greater<float>());
    bound = most[count - 1];
  }
  std::vector<Place> found = from(k, x, n, bound);
  std::nth_element(found.begin(), found.begin() + count - 1, found.end());
  found.resize(static_cast<size_t>(count));
  return found;
}

// The last of those at least `share` times as likely as the likeliest.
Place last_likely(const Kernels& k, const float* x, int64_t n, float peak, double share) {
  Place last{peak, 0};
  for (const Place& one : from(k, x, n, peak + static_cast<float>(std::log(share)) - 0.1f))
    if (std::exp(static_cast<double>(one.value) - peak) >= share) last = std::max(last, one);
  return last;
}

}  // namespace

bool damaged(const float* x, int64_t n) {
  int wrong = 0;
  for (int64_t i = 0; i < n; i++) wrong |= !(x[i] < std::numeric_limits<float>::infinity());
  return wrong;
}

Place last_kept(const Kernels& k, const float* x, int64_t n, const Limits& limits) {
  float peak;
  const int64_t likeliest = k.find_max(x, n, &peak);
  if (limits.top_k <= 1) return {peak, likeliest};
  Place last{kNothing, n};  // all
  if (peak == kNothing) return last;
  if (limits.top_k < n) {
    std::vector<Place> found = largest(k, x, n, limits.top_k);
    last = found.back();
    if (limits.top_p < 1.0) {
      double mass = 0.0;
      for (const Place& one : found) mass += std::exp(static_cast<double>(one.value) - peak);
      last = last_needed(std::move(found), peak, limits.top_p * kAlmost * mass);
    }
  } else if (limits.top_p < 1.0) {
    last = last_of_nucleus(k, x, n, peak, limits.top_p * kAlmost);
  }
  if (limits.min_p > 0.0) last = std::min(last, last_likely(k, x, n, peak, limits.min_p));
  return last;
}

std::vector<int64_t> columns_to(const Kernels& k, const float* x, int64_t n, const Place& last) {
  const Scratch<int32_t> places = scratch<int32_t>(n);
  const int64_t count = k.collect(x, nullptr, 0.0f, n, last.value, places.get());
  std::vector<int64_t> columns;
  columns.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++)
    if (x[places[i]] > last.value || places[i] <= last.column) columns.push_back(places[i]);
  return columns;
}

}  // namespace outrider
