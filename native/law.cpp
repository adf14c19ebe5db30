#include "law.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "sampler.hpp"

namespace outrider {

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr int64_t kBlocks = 16;  // values summarised by their maximum when few of many are wanted
constexpr int kBinsPerUnit = 32, kBins = 24 * kBinsPerUnit + 1;  // of logits below the largest; the last takes the rest
constexpr float kDepths[] = {12, 8, 5, 3};  // logits below the largest down to which a small nucleus is looked for
constexpr int64_t kNarrow = 32;  // such a nucleus is among at most one column in so many
constexpr int64_t kFew = 4;  // a row is listed where about one column in so many is left, or fewer
constexpr double kAlmost = 1.0 - 4 * 0x1p-23;  // a mass that misses p by the rounding of its logits has reached it

template <class T>
using Scratch = std::unique_ptr<T[]>;
template <class T>
Scratch<T> scratch(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(n));
}

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

// ------------------------------------------------------------------------------------------------ one law

Law::Law(const Kernels& kernels, const Laws& laws, int64_t place, bool share)
    : kernels_(kernels),
      x_(laws.logits + place * laws.width),
      ids_(laws.ids ? laws.ids + place * laws.width : nullptr),
      count_(laws.width),
      divisor_(laws.divisors ? laws.divisors[place] : 1.0f),
      share_(share) {
  if (laws.top_k) cut({laws.top_k[place], laws.top_p[place], laws.min_p[place]});
  const int64_t parts = piece_count(count_);
  std::vector<float> most(static_cast<size_t>(parts));
  pieces([&](int64_t first, int64_t count, int64_t piece) { kernels_.find_max(x_ + first, count, &most[piece]); });
  const float largest = *std::max_element(most.begin(), most.end());
  if (!std::isfinite(largest)) return;  // not sound
  peak_ = largest / divisor_;
  Masses sums(static_cast<size_t>(parts));
  pieces([&](int64_t first, int64_t count, int64_t piece) {
    sums[piece] = kernels_.exps(x_ + first, count, divisor_, peak_, 1.0f, nullptr);
  });
  for (double part : sums) sum_ += part;
}

void Law::cut(const Limits& limits) {
  if (limits.top_k >= count_ && limits.top_p >= 1.0 && limits.min_p <= 0.0) return;
  if (damaged(x_, count_)) return;  // not sound either, as it is
  const float* row = x_;
  if (divisor_ != 1.0f) {  // what is equal after rounding counts as equal
    own_.resize(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) own_[i] = x_[i] / divisor_;
    row = own_.data();
  }
  const Place last = last_kept(kernels_, row, count_, limits);
  const bool listed = kernels_.count_from(row, count_, last.value) * kFew <= count_;
  std::vector<float> left;
  if (listed) {
    own_ids_ = columns_to(kernels_, row, count_, last);
    left.reserve(own_ids_.size());
    for (int64_t column : own_ids_) left.push_back(row[column]);
  } else {
    left.resize(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) left[i] = row[i] < last.value ? kNothing : row[i];
    for (int64_t i = last.column + 1; i < count_; i++) left[i] = row[i] > last.value ? row[i] : kNothing;
  }
  own_ = std::move(left);
  x_ = own_.data();
  ids_ = listed ? own_ids_.data() : nullptr;
  count_ = static_cast<int64_t>(own_.size());
  divisor_ = 1.0f;
}

template <class Job>
void Law::pieces(Job&& job) const {
  for_pieces(share_, 1, count_, [&](int64_t, int64_t first, int64_t count, int64_t piece) { job(first, count, piece); });
}

double Law::at(int64_t token) const {
  int64_t column = token;
  if (ids_) {
    column = std::lower_bound(ids_, ids_ + count_, token) - ids_;
    if (column == count_ || ids_[column] != token) return 0.0;
  }
  if (column < 0 || column >= count_) return 0.0;
  const float z = x_[column] / divisor_;
  return std::exp(static_cast<double>(z) - peak_) / sum_;
}

int64_t Law::draw(uint64_t key) const {
  const auto word = static_cast<int64_t>(key);
  int64_t column;
  gumbel_argmax(x_, 1, count_, &word, &divisor_, ids_, &column, share_);
  return token(column);
}

int64_t Law::pick(double u) const {
  const Scratch<float> all = scratch<float>(count_);
  Masses sums(static_cast<size_t>(piece_count(count_)));
  pieces([&](int64_t first, int64_t count, int64_t piece) {
    sums[piece] = kernels_.exps(x_ + first, count, divisor_, peak_, 1.0f, all.get() + first);
  });
  return search(all.get(), sums, sum_, u);
}

int64_t Law::pick_excess(double u, double weight, const Law* other, int64_t draft) const {
  const Scratch<float> all = scratch<float>(count_);
  const Masses sums = fill_excess(weight, other, draft, all.get());
  double total = 0.0;
  for (double part : sums) total += part;
  return total > 0.0 ? search(all.get(), sums, total, u) : pick(u);
}

double Law::excess(double weight, const Law* other, int64_t draft) const {
  if (!other) return weight * (1.0 - at(draft));
  const Scratch<float> all = scratch<float>(count_);
  double total = 0.0;
  for (double part : fill_excess(weight, other, draft, all.get())) total += part;
  return total;
}

Law::Masses Law::fill_excess(double weight, const Law* other, int64_t draft, float* out) const {
  Masses sums(static_cast<size_t>(piece_count(count_)));
  pieces([&](int64_t first, int64_t count, int64_t piece) {
    float taken[kPiece];
    masses(first, count, out + first);
    if (other)
      other->masses_of(*this, first, count, taken);
    else
      for (int64_t i = 0; i < count; i++) taken[i] = token(first + i) == draft ? 2.0f : 0.0f;  // more than it has
    sums[piece] = kernels_.excess(out + first, taken, count, static_cast<float>(weight));
  });
  return sums;
}

void Law::masses(int64_t first, int64_t count, float* out) const {
  kernels_.exps(x_ + first, count, divisor_, peak_, static_cast<float>(1.0 / sum_), out);
}

// This law's probabilities of the tokens in some columns of another.
void Law::masses_of(const Law& whose, int64_t first, int64_t count, float* out) const {
  if (!ids_ && !whose.ids_) return masses(first, count, out);
  float logits[kPiece];
  if (!ids_) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t id = whose.ids_[first + i];  // past the vocabulary where a row lists fewer tokens than others
      logits[i] = id < count_ ? x_[id] : kNothing;
    }
  } else {
    std::fill(logits, logits + count, kNothing);
    const int64_t* mine = std::lower_bound(ids_, ids_ + count_, whose.token(first));
    for (int64_t i = 0; i < count && mine != ids_ + count_;) {
      const int64_t theirs = whose.token(first + i);
      if (*mine == theirs) logits[i++] = x_[mine++ - ids_];
      else if (*mine < theirs) ++mine;
      else i = whose.ids_ ? i + 1 : *mine - first;  // the columns between are none of mine
    }
  }
  kernels_.exps(logits, count, divisor_, peak_, static_cast<float>(1.0 / sum_), out);
}

int64_t Law::search(const float* masses, const Masses& sums, double total, double u) const {
  double left = std::min(u, 1.0 - 0x1p-50) * total;
  size_t piece = 0;
  while (piece + 1 < sums.size() && left >= sums[piece]) left -= sums[piece++];
  int64_t found = -1;
  const int64_t first = static_cast<int64_t>(piece) * kPiece, end = std::min(count_, first + kPiece);
  for (int64_t i = first; i < end; i++) {
    if (masses[i] <= 0.0f) continue;  // never a token of no mass
    found = i;
    if (left < masses[i]) break;
    left -= masses[i];
  }
  // Rounding may leave the piece that was found without an end, or without mass: then its neighbours' nearest mass.
  for (int64_t i = first - 1; found < 0 && i >= 0; i--)
    if (masses[i] > 0.0f) found = i;
  for (int64_t i = 0; found < 0 && i < count_; i++)
    if (masses[i] > 0.0f) found = i;
  return token(found < 0 ? 0 : found);
}

}  // namespace outrider
