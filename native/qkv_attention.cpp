// QKV projection and attention: the parts of Pass that work head by head.
#include <algorithm>
#include <cstring>

#include "pass.hpp"

namespace outrider {

namespace {

Operand query_operand(char* queries, size_t stride) {
  Operand to;
  to.data = queries;
  to.stride = stride;
  return to;
}

}  // namespace

// Projects one head of all rows, then norm and rotary positions; queries go to the workspace, keys and values to the
// cache. `part` counts the heads of a key/value head's group: its queries, the key, the value.
void Pass::project_head(int thread, size_t index, const Operand& x, int kv_head, int part) {
  const Layer& layer = stack_.layers_[index];
  const LayerSpec& spec = layer.spec;
  const int panels = layer.head_pad / kernels_.panel, first = (kv_head * layer.parts + part) * panels;
  float* tile = space_.local[thread].tile;
  kernels_.gemm(layer.qkv.weights(), x, rows_, first, first + panels, tile, layer.head_pad);
  if (part >= layer.group) return store_key_value(thread, index, kv_head, part, tile);

  const RopeTable& rope = stack_.ropes_[spec.rope];
  const size_t half = spec.head_dim / 2, stride = layer.head_pad * sizeof(float);
  const Operand to = query_operand(space_.queries, stride);
  float* rotated = space_.local[thread].row;
  const DType kind = cache_->dtype() == DType::f32 ? DType::f32 : DType::bf16;
  for (const Segment& segment : chunk_->segments)
    for (int i = 0; i < segment.count; i++) {
      const int m = segment.first + i;
      const size_t at = (segment.start + i) * half;
      kernels_.rotate(tile + static_cast<size_t>(m) * layer.head_pad, spec.qk_norm ? layer.q_norm.data() : nullptr,
                      stack_.spec_.eps, rope.cosine.data() + at, rope.sine.data() + at, spec.attention_scale,
                      spec.head_dim, rotated);
      kernels_.prepare(kind, rotated, nullptr, 0.0f, spec.head_dim, spec.head_dim, nullptr, to,
                       (kv_head * rows_ + m) * layer.group + part);
    }
}

void Pass::store_key_value(int thread, size_t index, int kv_head, int part, const float* tile) {
  const Layer& layer = stack_.layers_[index];
  const LayerSpec& spec = layer.spec;
  const RopeTable& rope = stack_.ropes_[spec.rope];
  const size_t half = spec.head_dim / 2;
  const DType kind = cache_->dtype();
  const bool is_key = part == layer.group, is_value = !is_key || spec.value_is_key;
  float* row = space_.local[thread].row;
  for (const Segment& segment : chunk_->segments)
    for (int i = 0; i < segment.count; i++) {
      const float* x = tile + static_cast<size_t>(segment.first + i) * layer.head_pad;
      const int64_t position = segment.start + i;
      const size_t at = position * half;
      char* const block = cache_->block(static_cast<int>(index), segment.slot, kv_head, position);
      if (is_key) {
        kernels_.rotate(x, spec.qk_norm ? layer.k_norm.data() : nullptr, stack_.spec_.eps, rope.cosine.data() + at,
                        rope.sine.data() + at, 1.0f, spec.head_dim, row);
        kernels_.store_key(kind, row, spec.head_dim, layer.head_pad, position % kBlock, block);
      }
      if (!is_value) continue;
      if (spec.v_norm) {
        kernels_.rms_norm(x, layer.v_norm.data(), stack_.spec_.eps, spec.head_dim, row);
        std::fill(row + spec.head_dim, row + layer.head_pad, 0.0f);
        x = row;
      }
      kernels_.store_value(kind, x, spec.head_dim, layer.head_pad, position % kBlock, block);
    }
}

// Attention of one unit's queries over its positions, one split after the other, into `state`. With `finish` it also
// writes the attention output.
void Pass::attend(int thread, size_t index, const AttentionUnit& unit, float* state, bool finish) {
  const Layer& layer = stack_.layers_[index];
  const Segment& segment = chunk_->segments[unit.segment];
  const int count = unit.tokens * layer.group, head_pad = layer.head_pad;
  AttentionTask task;
  task.query_stride = head_pad * sizeof(float);
  task.queries = space_.queries +
                 static_cast<size_t>(unit.kv_head * rows_ + segment.first + unit.token) * layer.group * task.query_stride;
  task.count = count;
  task.group = layer.group;
  task.first_position = segment.start + unit.token;
  task.row_end = segment.start + segment.count;
  task.causal = input_.causal;
  task.window = layer.spec.window;
  task.pages = cache_->pages(static_cast<int>(index), unit.kv_head);
  task.page_bytes = cache_->page_bytes();
  task.table = cache_->table(segment.slot).data();
  task.head_dim = layer.spec.head_dim;
  task.head_pad = head_pad;
  float* const part = space_.local[thread].state + static_cast<size_t>(count) * (head_pad + kStateTail);
  for (int64_t at = unit.begin; at < unit.end; at = task.end) {
    task.begin = at;
    task.end = std::min(unit.end, (at / kSplit + 1) * kSplit);
    task.state = at == unit.begin ? state : part;
    kernels_.attention_begin(task.state, count, head_pad);
    kernels_.attend(cache_->dtype(), task);
    if (task.state == part) kernels_.attention_merge(state, part, count, head_pad);
  }
  if (finish) write_attention(layer, unit, state);
}

void Pass::merge_splits(const Layer& layer, const AttentionPlan& plan, int target) {
  const AttentionUnit& unit = plan.units[plan.targets[target]];
  float* state = space_.partial + unit.state;
  for (int u = plan.targets[target] + 1; u < plan.targets[target + 1]; u++)
    kernels_.attention_merge(state, space_.partial + plan.units[u].state, unit.tokens * layer.group, layer.head_pad);
  write_attention(layer, unit, state);
}

void Pass::write_attention(const Layer& layer, const AttentionUnit& unit, const float* state) {
  const int first = chunk_->segments[unit.segment].first + unit.token;
  for (int m = 0; m < unit.tokens; m++)
    for (int g = 0; g < layer.group; g++, state += layer.head_pad + kStateTail) {
      const size_t column = static_cast<size_t>(unit.kv_head * layer.group + g) * layer.spec.head_dim;
      kernels_.attention_finish(state, layer.spec.head_dim, layer.head_pad,
                                space_.attention + (first + m) * space_.attention_stride + column);
    }
}

}  // namespace outrider
