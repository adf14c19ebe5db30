#include "verdict.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "mix.hpp"
#include "sampler.hpp"
#include "threadpool.hpp"

namespace outrider {

namespace {

constexpr double kTiny = 1e-300;  // stands for a q that rounded to 0: with it any p > 0 is accepted, and p = 0 is not

// One row's verdict.
class Judge {
 public:
  Judge(const Kernels& kernels, const VerdictTask& task, int64_t row, bool share)
      : kernels_(kernels),
        task_(task),
        control_(task.control[row]),
        tokens_(task.tokens + row * task.drafts),
        share_(share),
        targets_(static_cast<size_t>(control_.keep) + 1),
        drafters_(static_cast<size_t>(control_.keep)) {}

  // Returns false where a law is no law.
  bool decide(int64_t* out) {
    const Rule rule = static_cast<Rule>(control_.rule);
    rule == Rule::coupled ? follow() : rule == Rule::rejection ? reject() : block();
    if (!sound_) return false;
    out[0] = accepted_;
    std::copy(tokens_, tokens_ + task_.drafts, out + 1);
    out[1 + accepted_] = own_;
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
  const Law& target(int64_t depth) { return look(targets_[depth], task_.target, control_.start + depth); }
  const Law* drafter(int64_t depth) {
    return task_.drafter ? &look(drafters_[depth], *task_.drafter, control_.drafted + depth) : nullptr;
  }
  const Law& look(std::unique_ptr<Law>& law, const Laws& laws, int64_t place) {
    if (!law) law = std::make_unique<Law>(kernels_, laws, place, share_);
    sound_ = sound_ && law->sound();
    return *law;
  }
  // The laws of some drafts at once: threads share them where one law's passes are not worth sharing, or are cut.
  void look_at(int64_t first, int64_t last) {
    const int64_t count = 2 * (last - first), width = task_.target.width;
    if (!share_ || !task_.drafter || count * width < kWorthSharing / 2) return;
    if (width >= kWorthSharing && !task_.target.top_k) return;
    const auto pool = shared_pool();
    pool->run([&](int thread) {
      pool->deal(thread, count, [&](int64_t i) {
        const int64_t depth = first + i / 2;
        if (i % 2)
          drafters_[depth] = std::make_unique<Law>(kernels_, *task_.drafter, control_.drafted + depth, false);
        else
          targets_[depth] = std::make_unique<Law>(kernels_, task_.target, control_.start + depth, false);
      });
    });
  }
  static double ratio(const Law& p, const Law* q, int64_t token) {
    return p.at(token) / std::max(q ? q->at(token) : 1.0, kTiny);
  }

  void follow() {
    const uint64_t keys = stream(task_.purposes.tokens);
    for (int64_t i = 0; i <= control_.keep; i++) {
      const Law& p = target(i);
      if (!sound_) return;
      accepted_ = i;
      own_ = p.draw(word(keys, i));
      if (i < control_.keep && own_ != tokens_[i]) return;
    }
  }

  void reject() {
    for (int64_t i = 0; i < control_.keep; i++) {
      if (task_.target.top_k) look_at(i, i + 1);
      const Law& p = target(i);
      const Law* q = drafter(i);
      if (!sound_) return;
      if (uniform(task_.purposes.accept, i) < std::min(ratio(p, q, tokens_[i]), 1.0)) continue;
      accepted_ = i;
      own_ = p.pick_excess(uniform(task_.purposes.own, i), 1.0, q, tokens_[i]);
      return;
    }
    take_all();
  }

  void take_all() {
    const Law& p = target(control_.keep);
    accepted_ = control_.keep;
    if (sound_) own_ = p.pick(uniform(task_.purposes.own, accepted_));
  }

  // From the longest prefix to the shortest: the first that passes is kept, and shorter ones need no residual.
  void block() {
    const int64_t keep = control_.keep;
    look_at(0, keep);
    std::vector<double> weight(static_cast<size_t>(keep) + 1, 1.0);
    for (int64_t i = 0; i < keep; i++) {
      const Law& p = target(i);
      const Law* q = drafter(i);
      if (!sound_) return;
      weight[i + 1] = std::min(weight[i] * ratio(p, q, tokens_[i]), 1.0);
    }
    if (!keep || uniform(task_.purposes.accept, keep - 1) < weight[keep]) return take_all();
    for (int64_t i = keep - 1; i > 0; i--) {
      const double u = uniform(task_.purposes.accept, i - 1);
      if (u >= weight[i]) continue;  // the mass is at most the weight, and so is mass / (mass + 1 - weight)
      const Law& p = target(i);
      const Law* q = drafter(i);
      const double mass = p.excess(weight[i], q, tokens_[i]), all = mass + (1.0 - weight[i]);
      // Both vanish where the weight is 1 and p = q: then the next draft is accepted for certain, and with it this one.
      if (u < (all > 0.0 ? mass / all : 0.0)) return finish(i, weight[i], p, q);
    }
    const Law& p = target(0);
    finish(0, 1.0, p, drafter(0));
  }

  void finish(int64_t accepted, double weight, const Law& p, const Law* q) {
    accepted_ = accepted;
    own_ = p.pick_excess(uniform(task_.purposes.own, accepted), weight, q, tokens_[accepted]);
  }

  const Kernels& kernels_;
  const VerdictTask& task_;
  const VerdictRow& control_;
  const int64_t* tokens_;
  const bool share_;
  std::vector<std::unique_ptr<Law>> targets_, drafters_;  // by depth, made when they are first looked at
  bool sound_ = true;
  int64_t accepted_ = 0, own_ = 0;
};

}  // namespace

void verdict(const VerdictTask& task) {
  const Kernels& kernels = find_kernels();
  std::atomic<bool> damaged{false};
  const auto decide = [&](int64_t row, bool share) {
    if (!Judge(kernels, task, row, share).decide(task.out + row * (task.drafts + 2)))
      damaged.store(true, std::memory_order_relaxed);
  };
  if (task.rows > 1 && task.target.places * task.target.width >= kWorthSharing) {
    const auto pool = shared_pool();
    pool->run([&](int thread) { pool->deal(thread, task.rows, [&](int64_t row) { decide(row, false); }); });
  } else {
    for (int64_t row = 0; row < task.rows; row++) decide(row, true);
  }
  if (damaged) throw std::invalid_argument("logits must be numbers, got NaN or inf; the weights or the input are damaged");
}

}  // namespace outrider
