// Splits a layer's attention into units of work. The plan decides which thread computes what; results do not depend on
// it.
#include <algorithm>

#include "pass.hpp"

namespace outrider {

namespace {

constexpr int kUnitsPerThread = 4;  // with this many, threads that finish early can take over enough work
constexpr int kFewQueries = 3;       // of a unit: with fewer, reading the keys and values costs more than multiplying

// As many as a unit's states have room for; fewer where that would leave threads without an equal share.
int tokens_of_unit(const Layer& layer, const std::vector<Segment>& segments, int threads) {
  const auto units = [&](int tokens) {
    int count = 0;
    for (const Segment& segment : segments) count += (segment.count + tokens - 1) / tokens;
    return count * layer.spec.kv_heads;
  };
  int tokens = 1;
  for (const Segment& segment : segments) tokens = std::max(tokens, segment.count);
  tokens = std::min(tokens, std::max(1, kQueryTile / layer.group));
  while (tokens > 1 && tokens * layer.group >= 2 * kFewQueries && units(tokens) % threads &&
         units(tokens) < kUnitsPerThread * threads)
    tokens = (tokens + 1) / 2;
  return tokens;
}

void add_units(AttentionPlan& plan, const Layer& layer, const std::vector<Segment>& segments, bool causal,
               int tokens_per_unit) {
  for (int kv = 0; kv < layer.spec.kv_heads; kv++)
    for (size_t s = 0; s < segments.size(); s++) {
      const Segment& segment = segments[s];
      for (int token = 0; token < segment.count; token += tokens_per_unit) {
        const int tokens = std::min(tokens_per_unit, segment.count - token);
        const int64_t first = segment.start + token, window = layer.spec.window;
        const int64_t begin = window && first + 1 > window ? (first + 1 - window) / kBlock * kBlock : 0;
        const int64_t end = causal ? first + tokens : segment.start + segment.count;
        plan.units.push_back({static_cast<int>(s), kv, token, tokens, begin, end});
      }
    }
}

// Replaces every unit by one unit per split of its positions, each with its own partial state.
void split_units(AttentionPlan& plan, const Layer& layer) {
  std::vector<AttentionUnit> whole;
  whole.swap(plan.units);
  for (AttentionUnit unit : whole) {
    plan.targets.push_back(static_cast<int>(plan.units.size()));
    const int64_t end = unit.end;
    for (int64_t at = unit.begin; at < end; at = unit.end) {
      unit.begin = at;
      unit.end = std::min(end, (at / kSplit + 1) * kSplit);
      unit.state = plan.states;
      plan.states += static_cast<size_t>(unit.tokens) * layer.group * (layer.head_pad + kStateTail);
      plan.units.push_back(unit);
    }
  }
  plan.targets.push_back(static_cast<int>(plan.units.size()));
  plan.split = true;
}

}  // namespace

AttentionPlan plan_attention(const Layer& layer, const std::vector<Segment>& segments, bool causal, int threads) {
  AttentionPlan plan;
  const int heads = layer.spec.kv_heads, enough = kUnitsPerThread * threads;
  add_units(plan, layer, segments, causal, tokens_of_unit(layer, segments, threads));
  plan.by_head = heads % threads == 0 || heads >= enough;
  const auto spans_splits = [](const AttentionUnit& unit) { return unit.end - unit.begin > kSplit; };
  const bool few = static_cast<int>(plan.units.size()) < enough;
  if (!plan.by_head && few && std::any_of(plan.units.begin(), plan.units.end(), spans_splits)) split_units(plan, layer);
  return plan;
}

}  // namespace outrider
