// The distribution of the next token at one position: softmax(logits / temperature), truncated to top-k, top-p, min-p.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "sampler.hpp"
#include "truncation.hpp"

namespace outrider {

// Rows of logits with each row's sampling options. Rows over listed token ids are not truncated.
struct DistributionRows {
  const float* logits = nullptr;        // [rows, width]
  int64_t rows = 0, width = 0;
  const int64_t* ids = nullptr;         // [rows, width] ascending: the token of each column; null: column v is token v
  const float* temperatures = nullptr;  // [rows]; null: 1
  const int64_t* top_k = nullptr;       // [rows], together with top_p and min_p; null: no truncation
  const double* top_p = nullptr;
  const double* min_p = nullptr;
};

// One of these rows. Sums are taken piece by piece in a fixed order, so they do not depend on the number of threads.
class Distribution {
 public:
  // `parallel`: whether wide rows may use the thread pool (false inside a job of the pool). `drawn`: only `draw` will be
  // called, which needs no exponentials; then `valid` does not see NaN, and `draw` does.
  Distribution(const Kernels& kernels, const DistributionRows& rows, int64_t row, bool parallel, bool drawn = false);
  Distribution(const Distribution&) = delete;

  // False where the logits divided by the temperature hold NaN or +inf, or nothing but -inf.
  bool valid() const { return valid_; }
  double probability(int64_t token) const;
  // Gumbel-max sampling: the token with the largest logit + Gumbel value of this key (defined in
  // outrider.sampling.rng); -1 where there is NaN among the logits.
  int64_t draw(uint64_t key) const;
  // Inverse-CDF sampling: the token at which the cumulative probability reaches u.
  int64_t sample(double u) const;
  // The same from the residual distribution, norm(max(weight * p - q, 0)) with p this distribution and q `other`. A
  // null `other` has all its probability on the token `draft`. Samples from p where the residual is empty.
  int64_t sample_residual(double u, double weight, const Distribution* other, int64_t draft) const;
  // The sum of max(weight * p - q, 0).
  double residual_mass(double weight, const Distribution* other, int64_t draft) const;

 private:
  using Sums = std::vector<double>;  // one per piece of columns

  int64_t token(int64_t column) const { return ids_ ? ids_[column] : column; }
  void truncate(const Truncation& options);
  template <class Job>
  void for_each_piece(Job&& job) const;
  Sums fill_residual(double weight, const Distribution* other, int64_t draft, float* out) const;
  void probabilities(int64_t first, int64_t count, float* out) const;
  void probabilities_at(const Distribution& columns, int64_t first, int64_t count, float* out) const;
  int64_t search(const float* probabilities, const Sums& sums, double total, double u) const;

  const Kernels& kernels_;
  const float* logits_;
  const int64_t* ids_;
  int64_t count_;
  float temperature_, max_ = 0.0f;  // max_: the largest logit / temperature
  double sum_ = 0.0;                // of exp(logit / temperature - max_)
  bool parallel_, valid_ = false;
  Sums sums_;                       // of the pieces' exponentials; their total is sum_
  Scratch<float> terms_;            // the exponentials, where a row is so short that keeping them beats computing them
  std::vector<float> kept_logits_;  // what truncation keeps; logits_ and ids_ then point here
  std::vector<int64_t> kept_ids_;
};

}  // namespace outrider
