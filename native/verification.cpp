#include "verification.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "sampler.hpp"
#include "splitmix.hpp"
#include "threadpool.hpp"

namespace outrider {

namespace {

constexpr double kTiny = 1e-300;  // replaces a q that rounded to 0: then any p > 0 is accepted, and p = 0 is not

// Verifies the drafts of one row of the batch. `depth` counts the drafts of the row from 0.
class RowVerifier {
 public:
  RowVerifier(const Kernels& kernels, const VerificationTask& task, int64_t row, bool parallel)
      : kernels_(kernels),
        task_(task),
        control_(task.control[row]),
        drafts_(task.tokens + row * task.drafts),
        parallel_(parallel),
        target_(static_cast<size_t>(control_.keep) + 1),
        drafter_(static_cast<size_t>(control_.keep)) {}

  // Returns false where a distribution that was needed is not valid.
  bool run(int64_t* out) {
    const Rule rule = static_cast<Rule>(control_.rule);
    rule == Rule::coupled ? verify_coupled() : rule == Rule::rejection ? verify_rejection() : verify_block();
    if (!valid_) return false;
    out[0] = accepted_;
    std::copy(drafts_, drafts_ + task_.drafts, out + 1);
    out[1 + accepted_] = next_token_;
    return true;
  }

 private:
  uint64_t stream(uint64_t purpose) const {
    const uint64_t request = absorb(static_cast<uint64_t>(control_.seed), static_cast<uint64_t>(control_.round));
    return absorb(request, purpose);
  }
  uint64_t word(uint64_t stream, int64_t depth) const {
    return absorb(stream, static_cast<uint64_t>(control_.position + depth));
  }
  double uniform(uint64_t purpose, int64_t depth) const {
    return (static_cast<double>(word(stream(purpose), depth) >> 12) + 0.5) * 0x1p-52;
  }
  const Distribution& target(int64_t depth) {
    return computed(target_[depth], task_.target, control_.target_row + depth);
  }
  const Distribution* drafter(int64_t depth) {
    if (!task_.drafter) return nullptr;
    return &computed(drafter_[depth], *task_.drafter, control_.drafter_row + depth);
  }
  const Distribution& computed(std::unique_ptr<Distribution>& entry, const DistributionRows& rows, int64_t row) {
    if (!entry) {
      const bool drawn = static_cast<Rule>(control_.rule) == Rule::coupled;
      entry = std::make_unique<Distribution>(kernels_, rows, row, parallel_, drawn);
    }
    valid_ = valid_ && entry->valid();
    return *entry;
  }
  // Computes both models' distributions of drafts [first, last), one per thread. Only where that pays: a row that is
  // wide enough to keep all threads busy by itself, and is not truncated, is better computed alone.
  void compute_ahead(int64_t first, int64_t last) {
    const int64_t count = 2 * (last - first), width = task_.target.width;
    if (!parallel_ || !task_.drafter || count * width < kParallelThreshold / 2) return;
    if (width >= kParallelThreshold && !task_.target.top_k) return;
    const auto pool = shared_pool();
    pool->run([&](int thread) {
      pool->parallel_for(thread, count, [&](int64_t i) {
        const int64_t depth = first + i / 2;
        if (i % 2)
          drafter_[depth] =
              std::make_unique<Distribution>(kernels_, *task_.drafter, control_.drafter_row + depth, false);
        else
          target_[depth] = std::make_unique<Distribution>(kernels_, task_.target, control_.target_row + depth, false);
      });
    });
  }
  static double ratio(const Distribution& p, const Distribution* q, int64_t token) {
    return p.probability(token) / std::max(q ? q->probability(token) : 1.0, kTiny);
  }

  void verify_coupled() {
    const uint64_t keys = stream(task_.purposes.gumbel);
    for (int64_t i = 0; i <= control_.keep; i++) {
      const Distribution& p = target(i);
      if (!valid_) return;
      accepted_ = i;
      next_token_ = p.draw(word(keys, i));
      valid_ = next_token_ >= 0;
      if (!valid_) return;
      if (i < control_.keep && next_token_ != drafts_[i]) return;
    }
  }

  void verify_rejection() {
    for (int64_t i = 0; i < control_.keep; i++) {
      if (task_.target.top_k) compute_ahead(i, i + 1);
      const Distribution& p = target(i);
      const Distribution* q = drafter(i);
      if (!valid_) return;
      if (uniform(task_.purposes.accept, i) < std::min(ratio(p, q, drafts_[i]), 1.0)) continue;
      return reject(i, 1.0, p, q);
    }
    accept_all();
  }

  // From the longest prefix to the shortest: the first that passes is accepted, and shorter ones need no residual.
  void verify_block() {
    const int64_t keep = control_.keep;
    compute_ahead(0, keep);
    std::vector<double> weight(static_cast<size_t>(keep) + 1, 1.0);
    for (int64_t i = 0; i < keep; i++) {
      const Distribution& p = target(i);
      const Distribution* q = drafter(i);
      if (!valid_) return;
      weight[i + 1] = std::min(weight[i] * ratio(p, q, drafts_[i]), 1.0);
    }
    if (!keep || uniform(task_.purposes.accept, keep - 1) < weight[keep]) return accept_all();
    for (int64_t i = keep - 1; i > 0; i--) {
      const double u = uniform(task_.purposes.accept, i - 1);
      if (u >= weight[i]) continue;  // mass <= weight, so mass / (mass + 1 - weight) <= weight: no need to compute it
      const Distribution& p = target(i);
      const Distribution* q = drafter(i);
      const double mass = p.residual_mass(weight[i], q, drafts_[i]), all = mass + (1.0 - weight[i]);
      // Both are 0 where the weight is 1 and p = q: then the next draft is always accepted, and this one with it.
      if (u < (all > 0.0 ? mass / all : 0.0)) return reject(i, weight[i], p, q);
    }
    const Distribution& p = target(0);
    reject(0, 1.0, p, drafter(0));
  }

  // All drafts are accepted; the bonus token is sampled from the target's last distribution.
  void accept_all() {
    const Distribution& p = target(control_.keep);
    accepted_ = control_.keep;
    if (valid_) next_token_ = p.sample(uniform(task_.purposes.next_token, accepted_));
  }

  // `accepted` drafts are accepted; the recovered token is sampled from the residual at the next one.
  void reject(int64_t accepted, double weight, const Distribution& p, const Distribution* q) {
    accepted_ = accepted;
    next_token_ = p.sample_residual(uniform(task_.purposes.next_token, accepted), weight, q, drafts_[accepted]);
  }

  const Kernels& kernels_;
  const VerificationTask& task_;
  const VerificationRow& control_;
  const int64_t* drafts_;
  const bool parallel_;
  std::vector<std::unique_ptr<Distribution>> target_, drafter_;  // by depth, computed on first use
  bool valid_ = true;
  int64_t accepted_ = 0, next_token_ = 0;
};

}  // namespace

void verify(const VerificationTask& task) {
  const Kernels& kernels = find_kernels();
  std::atomic<bool> invalid{false};
  const auto verify_row = [&](int64_t row, bool parallel) {
    if (!RowVerifier(kernels, task, row, parallel).run(task.out + row * (task.drafts + 2)))
      invalid.store(true, std::memory_order_relaxed);
  };
  if (task.rows > 1 && task.target.rows * task.target.width >= kParallelThreshold) {
    const auto pool = shared_pool();
    pool->run([&](int thread) { pool->parallel_for(thread, task.rows, [&](int64_t row) { verify_row(row, false); }); });
  } else {
    for (int64_t row = 0; row < task.rows; row++) verify_row(row, true);
  }
  if (invalid) throw std::invalid_argument("logits must be numbers, got NaN or inf; the weights or the input are damaged");
}

}  // namespace outrider
