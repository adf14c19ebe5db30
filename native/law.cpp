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

constexpr int64_t kBlocks = 16;  // values summarised by their maximum when few of many are wanted
constexpr int kBinsPerUnit = 32, kBins = 24 * kBinsPerUnit + 1;  // of logits below the largest; the last takes the rest
constexpr int64_t kFew = 4;  // a row is listed where at most one column in so many is left
constexpr double kAlmost = 1.0 - 4 * 0x1p-23;  // a mass that misses p by the rounding of its logits has reached it

template <class T>
using Scratch = std::unique_ptr<T[]>;
template <class T>
Scratch<T> scratch(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(n));
}

struct Candidate {
  float value;
  int64_t column;
  bool operator<(const Candidate& other) const {
    return value != other.value ? value > other.value : column < other.column;
  }
};

std::vector<Candidate> from(const Kernels& k, const float* x, int64_t n, float bound) {
  const Scratch<int32_t> places = scratch<int32_t>(n);
  const int64_t count = k.collect(x, nullptr, 0.0f, n, bound, places.get());
  std::vector<Candidate> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) found[i] = {x[places[i]], places[i]};
  return found;
}

// The `count` largest, in order.
std::vector<Candidate> largest(const Kernels& k, const float* x, int64_t n, int64_t count) {
  const int64_t length = n / kBlocks;
  float bound = -std::numeric_limits<float>::infinity();
  if (length >= 4 * count) {  // each block's maximum is a value of the row: `count` of them bound it
    std::vector<float> most(static_cast<size_t>(length));
    k.fold_max(x, kBlocks, length, most.data());
    std::nth_element(most.begin(), most.begin() + count - 1, most.end(), std::greater<float>());
    bound = most[count - 1];
  }
  std::vector<Candidate> found = from(k, x, n, bound);
  std::nth_element(found.begin(), found.begin() + count - 1, found.end());
  found.resize(static_cast<size_t>(count));
  std::sort(found.begin(), found.end());
  return found;
}

// Adds the mass of each bin of logits below the peak. Several sums a bin, so that additions need not wait for each other.
template <class Bin>
std::array<double, kBins> masses_by_bin(const float* x, const float* weight, int64_t n, Bin&& bin_of) {
  constexpr int kSums = 4;
  std::array<std::array<double, kSums>, kBins> part{};
  for (int64_t i = 0; i < n; i++) part[bin_of(x[i])][i % kSums] += weight[i];
  std::array<double, kBins> mass;
  for (int bin = 0; bin < kBins; bin++) mass[bin] = (part[bin][0] + part[bin][1]) + (part[bin][2] + part[bin][3]);
  return mass;
}

// The columns down to the one with which the mass reaches p, ascending. The mass of narrow bins of logits says in which
// bin that is; only what lies there is put in order.
std::vector<int64_t> nucleus(const Kernels& k, const float* x, int64_t n, float peak, double p) {
  const Scratch<float> weight = scratch<float>(n);
  k.exps(x, n, 1.0f, peak, 1.0f, weight.get());
  const auto bin_of = [peak](float value) {
    const float below = (peak - value) * kBinsPerUnit;
    return below < kBins - 1 ? static_cast<int>(below) : kBins - 1;
  };
  const std::array<double, kBins> mass = masses_by_bin(x, weight.get(), n, bin_of);
  double whole = 0.0, above = 0.0;
  for (double part : mass) whole += part;
  const double goal = p * kAlmost * whole;
  int last = 0;
  while (last < kBins - 1 && above + mass[last] < goal) above += mass[last++];
  std::vector<Candidate> edge;
  for (int64_t i = 0; i < n; i++)
    if (bin_of(x[i]) == last) edge.push_back({x[i], i});
  std::sort(edge.begin(), edge.end());
  size_t count = 0;
  while (count < edge.size() && above < goal) above += std::exp(static_cast<double>(edge[count++].value) - peak);
  std::vector<int64_t> columns;
  if (!count) {  // rounding: the bins above hold it all
    for (int64_t i = 0; i < n; i++)
      if (bin_of(x[i]) < last) columns.push_back(i);
    return columns;
  }
  const Candidate& lowest = edge[count - 1];
  const Scratch<int32_t> places = scratch<int32_t>(n);
  const int64_t reached = k.collect(x, nullptr, 0.0f, n, lowest.value, places.get());
  columns.reserve(static_cast<size_t>(reached));
  for (int64_t i = 0; i < reached; i++)
    if (x[places[i]] > lowest.value || places[i] <= lowest.column) columns.push_back(places[i]);
  return columns;
}

}  // namespace

bool damaged(const float* x, int64_t n) {
  int wrong = 0;
  for (int64_t i = 0; i < n; i++) wrong |= !(x[i] < std::numeric_limits<float>::infinity());
  return wrong;
}

std::vector<int64_t> kept_columns(const Kernels& k, const float* x, int64_t n, const Limits& limits) {
  float peak;
  const int64_t likeliest = k.find_max(x, n, &peak);
  if (limits.top_k <= 1) return {likeliest};
  std::vector<int64_t> columns;
  if (limits.top_k >= n && limits.top_p < 1.0) {
    columns = nucleus(k, x, n, peak, limits.top_p);
  } else {
    std::vector<Candidate> found;
    if (limits.top_k < n)
      found = largest(k, x, n, limits.top_k);
    else
      found = from(k, x, n, peak + static_cast<float>(std::log(limits.min_p)) - 0.1f);
    if (limits.top_p < 1.0) {
      double whole = 0.0, before = 0.0;
      for (const Candidate& one : found) whole += std::exp(static_cast<double>(one.value) - peak);
      size_t count = 0;
      while (count < found.size() && before < limits.top_p * kAlmost * whole)
        before += std::exp(static_cast<double>(found[count++].value) - peak);
      found.resize(count);
    }
    columns.reserve(found.size());
    for (const Candidate& one : found) columns.push_back(one.column);
    std::sort(columns.begin(), columns.end());
  }
  if (limits.min_p > 0.0)
    std::erase_if(columns, [&](int64_t i) { return std::exp(static_cast<double>(x[i]) - peak) < limits.min_p; });
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
  own_ids_ = kept_columns(kernels_, row, count_, limits);
  const bool listed = static_cast<int64_t>(own_ids_.size()) * kFew <= count_;
  std::vector<float> left;
  if (listed) {
    left.reserve(own_ids_.size());
    for (int64_t column : own_ids_) left.push_back(row[column]);
  } else {
    left.assign(static_cast<size_t>(count_), -std::numeric_limits<float>::infinity());
    for (int64_t column : own_ids_) left[column] = row[column];
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
      logits[i] = id < count_ ? x_[id] : -std::numeric_limits<float>::infinity();
    }
  } else {
    std::fill(logits, logits + count, -std::numeric_limits<float>::infinity());
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
