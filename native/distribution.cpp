#include "distribution.hpp"

#include <algorithm>
#include <cmath>

#include "sampler.hpp"

namespace outrider {

namespace {

// A truncated row is stored as a list of ids where at most one column in kListRatio is kept, else with masked logits.
constexpr int64_t kListRatio = 4;
constexpr int64_t kKeptTerms = 16384;  // columns of a row whose exponentials are kept

}  // namespace

Distribution::Distribution(const Kernels& kernels, const DistributionRows& rows, int64_t row, bool parallel,
                           bool drawn)
    : kernels_(kernels),
      logits_(rows.logits + row * rows.width),
      ids_(rows.ids ? rows.ids + row * rows.width : nullptr),
      count_(rows.width),
      temperature_(rows.temperatures ? rows.temperatures[row] : 1.0f),
      parallel_(parallel) {
  if (rows.top_k) truncate({rows.top_k[row], rows.top_p[row], rows.min_p[row]});
  const int64_t pieces = piece_count(count_);
  std::vector<float> maxima(static_cast<size_t>(pieces));
  for_each_piece([&](int64_t first, int64_t count, int64_t piece) {
    kernels_.find_max(logits_ + first, count, &maxima[piece]);
  });
  const float largest = *std::max_element(maxima.begin(), maxima.end());
  max_ = largest / temperature_;
  valid_ = std::isfinite(max_);
  if (!valid_ || drawn) return;
  if (count_ <= kKeptTerms) terms_ = scratch<float>(count_);
  sums_.resize(static_cast<size_t>(pieces));
  for_each_piece([&](int64_t first, int64_t count, int64_t piece) {
    sums_[piece] =
        kernels_.exp_sum(logits_ + first, count, temperature_, max_, 1.0f, terms_ ? terms_.get() + first : nullptr);
  });
  for (double sum : sums_) sum_ += sum;
  valid_ = sum_ > 0.0 && std::isfinite(sum_);
}

void Distribution::truncate(const Truncation& options) {
  if (options.top_k >= count_ && options.top_p >= 1.0 && options.min_p <= 0.0) return;
  const float* row = logits_;
  if (temperature_ != 1.0f) {  // divide first: logits that are equal after rounding count as ties
    kept_logits_.resize(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) kept_logits_[i] = logits_[i] / temperature_;
    row = kept_logits_.data();
  }
  if (has_nan_or_inf(row, count_)) return;  // the constructor finds it not valid
  const Candidate last = last_kept(kernels_, row, count_, options);
  const bool listed = kernels_.count_from(row, count_, last.logit) * kListRatio <= count_;
  std::vector<float> kept;
  if (listed) {
    kept_ids_ = kept_columns(kernels_, row, count_, last);
    kept.reserve(kept_ids_.size());
    for (int64_t column : kept_ids_) kept.push_back(row[column]);
  } else {
    kept.resize(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) kept[i] = row[i] < last.logit ? kMaskedLogit : row[i];
    for (int64_t i = last.column + 1; i < count_; i++) kept[i] = row[i] > last.logit ? row[i] : kMaskedLogit;
  }
  kept_logits_ = std::move(kept);
  logits_ = kept_logits_.data();
  ids_ = listed ? kept_ids_.data() : nullptr;
  count_ = static_cast<int64_t>(kept_logits_.size());
  temperature_ = 1.0f;
}

template <class Job>
void Distribution::for_each_piece(Job&& job) const {
  for_pieces(parallel_, 1, count_,
             [&](int64_t, int64_t first, int64_t count, int64_t piece) { job(first, count, piece); });
}

double Distribution::probability(int64_t token) const {
  int64_t column = token;
  if (ids_) {
    column = std::lower_bound(ids_, ids_ + count_, token) - ids_;
    if (column == count_ || ids_[column] != token) return 0.0;
  }
  if (column < 0 || column >= count_) return 0.0;
  const float z = logits_[column] / temperature_;
  return std::exp(static_cast<double>(z) - max_) / sum_;
}

int64_t Distribution::draw(uint64_t key) const {
  const auto word = static_cast<int64_t>(key);
  int64_t column;
  return try_gumbel_argmax(logits_, 1, count_, &word, &temperature_, ids_, &column, parallel_) ? token(column) : -1;
}

int64_t Distribution::sample(double u) const {
  if (terms_) return search(terms_.get(), sums_, sum_, u);
  const Scratch<float> terms = scratch<float>(count_);
  for_each_piece([&](int64_t first, int64_t count, int64_t) {
    kernels_.exp_sum(logits_ + first, count, temperature_, max_, 1.0f, terms.get() + first);
  });
  return search(terms.get(), sums_, sum_, u);
}

int64_t Distribution::sample_residual(double u, double weight, const Distribution* other, int64_t draft) const {
  const Scratch<float> residual = scratch<float>(count_);
  const Sums sums = fill_residual(weight, other, draft, residual.get());
  double total = 0.0;
  for (double sum : sums) total += sum;
  return total > 0.0 ? search(residual.get(), sums, total, u) : sample(u);
}

double Distribution::residual_mass(double weight, const Distribution* other, int64_t draft) const {
  if (!other) return weight * (1.0 - probability(draft));
  const Scratch<float> residual = scratch<float>(count_);
  double total = 0.0;
  for (double sum : fill_residual(weight, other, draft, residual.get())) total += sum;
  return total;
}

Distribution::Sums Distribution::fill_residual(double weight, const Distribution* other, int64_t draft,
                                               float* out) const {
  Sums sums(static_cast<size_t>(piece_count(count_)));
  for_each_piece([&](int64_t first, int64_t count, int64_t piece) {
    float q[kPiece];
    probabilities(first, count, out + first);
    if (other)
      other->probabilities_at(*this, first, count, q);
    else
      for (int64_t i = 0; i < count; i++) q[i] = token(first + i) == draft ? 2.0f : 0.0f;  // 2 exceeds any weight * p
    sums[piece] = kernels_.residual_sum(out + first, q, count, static_cast<float>(weight));
  });
  return sums;
}

void Distribution::probabilities(int64_t first, int64_t count, float* out) const {
  const auto scale = static_cast<float>(1.0 / sum_);
  if (terms_) {  // the same bits: the kernel multiplies the same exponentials by this
    for (int64_t i = 0; i < count; i++) out[i] = terms_[first + i] * scale;
    return;
  }
  kernels_.exp_sum(logits_ + first, count, temperature_, max_, scale, out);
}

// This distribution's probabilities of the tokens in columns [first, first + count) of another one.
void Distribution::probabilities_at(const Distribution& columns, int64_t first, int64_t count, float* out) const {
  if (!ids_ && !columns.ids_) return probabilities(first, count, out);
  if (!columns.ids_) {  // the listed tokens among all
    std::fill_n(out, count, 0.0f);
    const int64_t* const begin = std::lower_bound(ids_, ids_ + count_, first);
    const int64_t* const end = std::lower_bound(begin, ids_ + count_, first + count);
    float listed[kPiece];
    probabilities(begin - ids_, end - begin, listed);
    for (const int64_t* id = begin; id < end; ++id) out[*id - first] = listed[id - begin];
    return;
  }
  float logits[kPiece];
  if (!ids_) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t id = columns.ids_[first + i];  // the vocabulary size where a row lists fewer tokens than others
      logits[i] = id < count_ ? logits_[id] : kMaskedLogit;
    }
  } else {
    std::fill(logits, logits + count, kMaskedLogit);
    const int64_t* id = std::lower_bound(ids_, ids_ + count_, columns.token(first));
    for (int64_t i = 0; i < count && id != ids_ + count_;) {
      const int64_t wanted = columns.token(first + i);
      if (*id == wanted) logits[i++] = logits_[id++ - ids_];
      else if (*id < wanted) ++id;
      else ++i;
    }
  }
  kernels_.exp_sum(logits, count, temperature_, max_, static_cast<float>(1.0 / sum_), out);
}

int64_t Distribution::search(const float* probabilities, const Sums& sums, double total, double u) const {
  double left = std::min(u, 1.0 - 0x1p-50) * total;
  size_t piece = 0;
  while (piece + 1 < sums.size() && left >= sums[piece]) left -= sums[piece++];
  int64_t found = -1;
  const int64_t first = static_cast<int64_t>(piece) * kPiece, end = std::min(count_, first + kPiece);
  // Tokens without probability are never found: `left` is at least 0. They are not skipped by a branch, because half of
  // a residual's columns are zeros in no order that a processor could predict.
  for (int64_t i = first; i < end; i++) {
    if (left < probabilities[i]) {
      found = i;
      break;
    }
    left -= probabilities[i];
  }
  for (int64_t i = end - 1; found < 0 && i >= first; i--)  // rounding: the last one with any probability
    if (probabilities[i] > 0.0f) found = i;
  // Rounding may point to a piece without any probability: then take the nearest token before it, else the first after.
  for (int64_t i = first - 1; found < 0 && i >= 0; i--)
    if (probabilities[i] > 0.0f) found = i;
  for (int64_t i = 0; found < 0 && i < count_; i++)
    if (probabilities[i] > 0.0f) found = i;
  return token(found < 0 ? 0 : found);
}

}  // namespace outrider
