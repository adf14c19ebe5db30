// Dealing out a layer's attention to threads. Results do not depend on it: only who computes what, and when.
#include <algorithm>

#include "pass.hpp"

namespace outrider {

namespace {

constexpr int64_t kUnitCost = 8;   // of starting a unit, in query-blocks
constexpr double kUneven = 1.15;   // splitting pays once the busiest thread has this many times its share

int64_t cost(const AttentionUnit& unit, int group) {
  return kUnitCost + static_cast<int64_t>(unit.tokens) * group * ((unit.end - unit.begin) / kBlock + 1);
}

// Contiguous shares of about equal cost; returns the largest share over the mean.
double deal(AttentionPlan& plan, int group, int threads) {
  int64_t total = 0, so_far = 0, worst = 0;
  for (const AttentionUnit& unit : plan.units) total += cost(unit, group);
  plan.bounds.assign(1, 0);
  size_t next = 0;
  for (int t = 0; t < threads; t++) {
    const int64_t begin = so_far;
    while (next < plan.units.size()) {
      const int64_t with = so_far + cost(plan.units[next], group);
      if (t + 1 < threads && (with + so_far) * threads > 2 * total * (t + 1)) break;  // nearer without it
      so_far = with;
      next++;
    }
    plan.bounds.push_back(static_cast<int>(next));
    worst = std::max(worst, so_far - begin);
  }
  return total ? static_cast<double>(worst) * threads / static_cast<double>(total) : 1.0;
}

void add_units(AttentionPlan& plan, const Layer& layer, const std::vector<Segment>& segments, bool causal, bool split) {
  const int tokens_per_unit = std::max(1, kQueryTile / layer.group);
  for (int kv = 0; kv < layer.spec.kv_heads; kv++)
    for (size_t s = 0; s < segments.size(); s++) {
      const Segment& segment = segments[s];
      for (int token = 0; token < segment.count; token += tokens_per_unit) {
        const int tokens = std::min(tokens_per_unit, segment.count - token);
        const int64_t first = segment.start + token, window = layer.spec.window;
        const int64_t begin = window && first + 1 > window ? (first + 1 - window) / kBlock * kBlock : 0;
        const int64_t end = causal ? first + tokens : segment.start + segment.count;
        AttentionUnit unit{static_cast<int>(s), kv, token, tokens, begin, end};
        if (!split) {
          plan.units.push_back(unit);
          continue;
        }
        plan.targets.push_back(static_cast<int>(plan.units.size()));
        for (int64_t at = begin; at < end; at = unit.end) {
          unit.begin = at;
          unit.end = std::min(end, (at / kSplit + 1) * kSplit);
          unit.state = plan.states;
          plan.states += static_cast<size_t>(tokens) * layer.group * (layer.head_pad + kStateTail);
          plan.units.push_back(unit);
        }
      }
    }
  if (split) plan.targets.push_back(static_cast<int>(plan.units.size()));
}

}  // namespace

AttentionPlan plan_attention(const Layer& layer, const std::vector<Segment>& segments, bool causal, int threads) {
  AttentionPlan plan;
  plan.by_head = layer.spec.kv_heads % threads == 0;
  add_units(plan, layer, segments, causal, false);
  if (plan.by_head) {
    const size_t per_thread = plan.units.size() / threads;
    for (int t = 0; t <= threads; t++) plan.bounds.push_back(static_cast<int>(per_thread * t));
    return plan;
  }
  if (deal(plan, layer.group, threads) <= kUneven) return plan;
  AttentionPlan parts;
  parts.split = true;
  add_units(parts, layer, segments, causal, true);
  if (parts.units.size() == plan.units.size()) return plan;
  deal(parts, layer.group, threads);
  return parts;
}

}  // namespace outrider
