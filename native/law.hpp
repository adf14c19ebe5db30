// The law of the next token at one place: softmax(logits / temperature), cut to top-k, top-p and min-p.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cut.hpp"
#include "kernels.hpp"

namespace outrider {

// Rows of logits, and what is asked of each. Rows of listed tokens are not cut.
struct Laws {
  const float* logits = nullptr;    // [places, width]
  int64_t places = 0, width = 0;
  const int64_t* ids = nullptr;     // [places, width] ascending: the token of each column; null: column v is token v
  const float* divisors = nullptr;  // [places] temperatures; null: 1
  const int64_t* top_k = nullptr;   // [places], with top_p and min_p; null: nothing is cut
  const double* top_p = nullptr;
  const double* min_p = nullptr;
};

// One of them. Sums are taken in one order, whoever takes part.
class Law {
 public:
  // `share`: whether wide rows may use the pool's threads.
  Law(const Kernels& kernels, const Laws& laws, int64_t place, bool share);
  Law(const Law&) = delete;

  // False where the logits hold NaN or +inf, or nothing else than -inf.
  bool sound() const { return sum_ > 0.0 && std::isfinite(sum_); }
  double at(int64_t token) const;
  // Column of the largest logit + Gumbel value of the key (outrider.noise), as a token.
  int64_t draw(uint64_t key) const;
  // The token at which the distribution function reaches u: of this law, or of norm(max(weight * this - other, 0)), where
  // a null `other` is all on the token `draft`. This law where that leaves nothing.
  int64_t pick(double u) const;
  int64_t pick_excess(double u, double weight, const Law* other, int64_t draft) const;
  // The mass of max(weight * this - other, 0).
  double excess(double weight, const Law* other, int64_t draft) const;

 private:
  using Masses = std::vector<double>;  // of each piece of columns

  int64_t token(int64_t column) const { return ids_ ? ids_[column] : column; }
  void cut(const Limits& limits);
  template <class Job>
  void pieces(Job&& job) const;
  Masses fill_excess(double weight, const Law* other, int64_t draft, float* out) const;
  void masses(int64_t first, int64_t count, float* out) const;
  void masses_of(const Law& whose, int64_t first, int64_t count, float* out) const;
  int64_t search(const float* masses, const Masses& sums, double total, double u) const;

  const Kernels& kernels_;
  const float* x_;
  const int64_t* ids_;
  int64_t count_;
  float divisor_, peak_ = 0.0f;  // the largest logit / divisor
  double sum_ = 0.0;             // of exp(logit / divisor - peak)
  bool share_;
  std::vector<float> own_;       // what is left of a row that was cut
  std::vector<int64_t> own_ids_;
};

}  // namespace outrider
