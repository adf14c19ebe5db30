#include "law.hpp"

#include <algorithm>
#include <cmath>

#include "sampler.hpp"

namespace outrider {

namespace {

constexpr int64_t kFew = 4;  // a row is listed where about one column in so many is left, or fewer

}  // namespace

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
