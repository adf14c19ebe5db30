#include "pass.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace outrider {

namespace {

// Bytes between rows: whole cache lines, but no multiple of 4,096, so that rows do not compete for the same cache sets.
size_t row_stride(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  return bytes % 4096 ? bytes : bytes + 64;
}

// Hands out consecutive pieces of memory; with a null base it only counts bytes.
class BumpAllocator {
 public:
  explicit BumpAllocator(char* base) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += row_stride(count * sizeof(T));
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace

Pass::Pass(Stack& stack, KVCache* cache, ThreadPool& pool, const PassInput& input, const PassOutput& output)
    : stack_(stack), cache_(cache), pool_(pool), kernels_(stack.kernels_), input_(input), output_(output) {}

// ------------------------------------------------------------------------------------------------ workspace

void Pass::allocate(int rows, size_t partial) {
  rows_ = rows;
  replicated_ = rows <= kReplicatedRows && pool_.threads() <= kReplicatedThreads;
  const StackSpec& spec = stack_.spec_;
  const int panel = kernels_.panel;
  int attention = 0, inner = 0, widest = std::max(spec.hidden, spec.input_width), head_pad = 0, queries = 0;
  for (const Layer& layer : stack_.layers_) {
    attention = std::max(attention, layer.spec.heads * layer.spec.head_dim);
    inner = std::max(inner, stack_.padded(layer.spec.intermediate));
    head_pad = std::max(head_pad, layer.head_pad);
    queries = std::max(queries, layer.spec.heads * layer.head_pad);
  }
  widest = static_cast<int>(round_up(std::max({widest, attention, inner, panel}), kWidestUnit));
  const size_t candidates = output_.largest ? chunk_->logits_token.size() * panel : 0;
  space_.x_stride = row_stride(stack_.padded(spec.hidden) * sizeof(float)) / sizeof(float);
  space_.attention_stride = row_stride(attention * sizeof(float)) / sizeof(float);
  space_.inner_stride = row_stride(inner * sizeof(float)) / sizeof(float);
  space_.tile_stride = std::max(head_pad, 2 * panel);
  const auto assign = [&](char* base) {
    BumpAllocator allocator(base);
    const auto operand = [&](int count) {
      Operand to;
      to.stride = row_stride(static_cast<size_t>(widest) * sizeof(float));
      to.data = allocator.take<char>(to.stride * count);
      to.sums_stride = widest / kGroup;
      const size_t groups = static_cast<size_t>(to.sums_stride) * count;
      to.scale = allocator.take<float>(groups);
      to.sums = allocator.take<int32_t>(groups);
      to.offsets = allocator.take<float>(groups);
      return to;
    };
    space_.y = allocator.take<float>(space_.x_stride * rows);
    space_.attention = allocator.take<float>(space_.attention_stride * rows);
    space_.inner = allocator.take<float>(space_.inner_stride * rows);
    space_.queries = allocator.take<char>(static_cast<size_t>(queries) * sizeof(float) * rows);
    space_.partial = allocator.take<float>(partial);
    space_.x = replicated_ ? nullptr : allocator.take<float>(space_.x_stride * rows);
    space_.operand = replicated_ ? Operand{} : operand(rows);
    space_.local.resize(pool_.threads());
    for (Workspace::Local& local : space_.local) {
      local.x = replicated_ ? allocator.take<float>(space_.x_stride * rows) : nullptr;
      local.operand = replicated_ ? operand(rows) : Operand{};
      local.row = allocator.take<float>(widest);
      local.tile = allocator.take<float>(space_.tile_stride * rows);
      local.state = allocator.take<float>(2 * static_cast<size_t>(std::max(kQueryTile, 1)) * (head_pad + kStateTail));
      local.best = allocator.take<float>(candidates);
      local.from = allocator.take<int32_t>(candidates);
    }
    return allocator.used();
  };
  const size_t bytes = assign(nullptr);
  if (stack_.scratch_.size() < bytes) stack_.scratch_ = Region(bytes);
  assign(stack_.scratch_.data());
  for (const Workspace::Local& local : space_.local) {  // of every thread, as some may be missing
    std::fill_n(local.best, candidates, -std::numeric_limits<float>::infinity());
    std::fill_n(local.from, candidates, -1);
  }
}

float* Pass::residual(int thread, int row) const {
  return (replicated_ ? space_.local[thread].x : space_.x) + row * space_.x_stride;
}

// ------------------------------------------------------------------------------------------------ rows

void Pass::store_features(int layer, int row, const float* x) const {
  const size_t width = stack_.spec_.hidden, count = output_.aux_layers.size();
  for (size_t i = 0; i < count; i++)
    if (output_.aux_layers[i] == layer)
      std::memcpy(output_.features + ((chunk_->first + row) * count + i) * width, x, width * sizeof(float));
}

// Calls item(row) for all rows: on every thread if rows are replicated, else on one thread each, followed by a barrier.
template <class Item>
void Pass::for_each_row(int thread, int rows, Item&& item) {
  if (replicated_) {
    for (int row = 0; row < rows; row++) item(row);
  } else {
    pool_.parallel_for(thread, rows, [&](int64_t row) { item(static_cast<int>(row)); });
    pool_.barrier();
  }
}

// Completes the residual of one row: adds the pending output, and stores features where they are asked for.
void Pass::add_pending(int thread, int row, const Pending& pending) {
  const StackSpec& spec = stack_.spec_;
  float* x = residual(thread, row);
  if (pending.y)
    kernels_.accumulate(x, pending.y + row * space_.x_stride, pending.gain ? pending.gain->data() : nullptr, spec.eps,
                        pending.scalar, spec.hidden, space_.local[thread].row);
  if (pending.layer != kNone && (!replicated_ || thread == 0)) store_features(pending.layer, row, x);
}

// Operand rows for `linear`. row(i) returns row i of the source; it is called by the thread that prepares row i.
template <class Row>
Operand Pass::prepare(int thread, int rows, const Linear& linear, int width, const float* gain, Row&& row) {
  const Weights& w = linear.weights();
  Operand to = replicated_ ? space_.local[thread].operand : space_.operand;
  to.stride = row_stride(static_cast<size_t>(w.inner) * kernels_.operand_bytes(w.dtype));
  for_each_row(thread, rows, [&](int i) {
    kernels_.prepare(w.dtype, row(i), gain, stack_.spec_.eps, width, w.inner, space_.local[thread].row, to, i);
  });
  return to;
}

// The same for rows that need no norm; with float32 weights they are used in place.
Operand Pass::convert(int thread, const Linear& linear, float* rows, size_t stride, int width) {
  if (linear.weights().dtype == DType::f32) {
    Operand to;
    to.data = reinterpret_cast<char*>(rows);
    to.stride = stride * sizeof(float);
    return to;
  }
  return prepare(thread, rows_, linear, width, nullptr, [&](int i) { return rows + i * stride; });
}

void Pass::project_rows(int thread, const Linear& linear, const Operand& x, float* y) {
  pool_.parallel_for(thread, linear.weights().panels, [&](int p) {
    kernels_.gemm(linear.weights(), x, rows_, p, p + 1, y + p * kernels_.panel, space_.x_stride);
  });
}

// ------------------------------------------------------------------------------------------------ one chunk

void Pass::forward(const Batch& batch, const Chunk& chunk) {
  chunk_ = &chunk;
  plans_.clear();
  plan_of_layer_.clear();
  size_t partial = 0;
  for (size_t i = 0; i < stack_.layers_.size(); i++) {
    const Layer& layer = stack_.layers_[i];
    size_t same = 0;
    for (; same < i; same++) {
      const Layer& other = stack_.layers_[same];
      if (other.spec.kv_heads == layer.spec.kv_heads && other.group == layer.group &&
          other.head_pad == layer.head_pad && other.spec.window == layer.spec.window)
        break;
    }
    if (same == i) {
      plans_.push_back(plan_attention(layer, chunk.segments, input_.causal, pool_.threads()));
      partial = std::max(partial, plans_.back().states);
    }
    plan_of_layer_.push_back(same == i ? static_cast<int>(plans_.size()) - 1 : plan_of_layer_[same]);
  }
  allocate(std::max(chunk.count, static_cast<int>(chunk.logits_token.size())), partial);
  rows_ = chunk.count;
  const size_t layers = stack_.layers_.size();
  size_t first = 0, last = 0;
  do {
    first = last;
    for (size_t work = 0; last < layers && work < kJobWork; last++) work += weights(stack_.layers_[last]) * rows_;
    const bool all = pool_.run([&](int thread) {
      if (first == 0) load_residual(thread, batch.tokens + chunk_->first);
      run_layers(thread, first, last);
      if (last == layers) finish(thread, pending_before(layers));
    });
    if (!all && replicated_) stop_replicating();
  } while (last < layers);
  if (output_.largest) write_largest();
}

size_t Pass::weights(const Layer& layer) const {
  size_t panels = 0;
  for (const Linear* linear : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
    panels += static_cast<size_t>(linear->weights().panels) * linear->weights().inner;
  return panels * kernels_.panel;
}

void Pass::run_layers(int thread, size_t first, size_t last) {
  for (size_t i = first; i < last; i++) {
    const Layer& layer = stack_.layers_[i];
    attention(thread, i, pending_before(i));
    mlp(thread, layer, {space_.y, stack_.spec_.sandwich ? &layer.attention_out_norm : nullptr, 1.0f, kNone});
  }
}

Pass::Pending Pass::pending_before(size_t layer) const {
  if (layer == 0) return {nullptr, nullptr, 1.0f, -1};
  const Layer& before = stack_.layers_[layer - 1];
  return {space_.y, stack_.spec_.sandwich ? &before.mlp_out_norm : nullptr, before.spec.scalar,
          static_cast<int>(layer) - 1};
}

// Between two jobs: the caller's copies are complete, whoever was missing.
void Pass::stop_replicating() {
  replicated_ = false;
  space_.x = space_.local[0].x;
  space_.operand = space_.local[0].operand;
}

void Pass::load_residual(int thread, const int64_t* tokens) {
  const size_t width = stack_.spec_.hidden;
  const float* given = stack_.spec_.input_width ? input_.residual : input_.hidden;
  for_each_row(thread, rows_, [&](int m) {
    if (given)
      std::memcpy(residual(thread, m), given + (chunk_->first + m) * width, width * sizeof(float));
    else
      stack_.embed(tokens + m, 1, residual(thread, m));
  });
}

void Pass::attention(int thread, size_t index, Pending pending) {
  const Layer& layer = stack_.layers_[index];
  const AttentionPlan& plan = plans_[plan_of_layer_[index]];
  const bool wide = index == 0 && stack_.spec_.input_width;
  const int width = wide ? stack_.spec_.input_width : stack_.spec_.hidden;
  const Operand x =
      prepare(thread, rows_, layer.qkv, width, wide ? nullptr : layer.input_norm.data(), [&](int m) -> const float* {
        add_pending(thread, m, pending);
        return wide ? input_.hidden + (chunk_->first + m) * static_cast<size_t>(width) : residual(thread, m);
      });
  const int heads = layer.spec.kv_heads, units = static_cast<int>(plan.units.size());
  const auto run = [&](int u) {
    const AttentionUnit& unit = plan.units[u];
    attend(thread, index, unit, plan.split ? space_.partial + unit.state : space_.local[thread].state, !plan.split);
  };
  if (plan.by_head) {
    pool_.parallel_for(thread, heads, [&](int kv) {
      for (int part = 0; part < layer.parts; part++) project_head(thread, index, x, kv, part);
      for (int u = units / heads * kv; u < units / heads * (kv + 1); u++) run(u);
    });
  } else {
    pool_.parallel_for(thread, heads * layer.parts, [&](int i) {
      project_head(thread, index, x, i / layer.parts, i % layer.parts);
    });
    pool_.barrier();
    pool_.parallel_for(thread, units, run);
  }
  if (plan.split) {
    pool_.barrier();
    pool_.parallel_for(thread, static_cast<int>(plan.targets.size()) - 1, [&](int t) { merge_splits(layer, plan, t); });
  }
  pool_.barrier();
  const Operand attended = convert(thread, layer.out, space_.attention, space_.attention_stride,
                                   layer.spec.heads * layer.spec.head_dim);
  project_rows(thread, layer.out, attended, space_.y);
  pool_.barrier();
}

void Pass::mlp(int thread, const Layer& layer, Pending pending) {
  const int panel = kernels_.panel;
  const Operand x = prepare(thread, rows_, layer.gate_up, stack_.spec_.hidden, layer.mlp_norm.data(), [&](int m) {
    add_pending(thread, m, pending);
    return residual(thread, m);
  });
  float* tile = space_.local[thread].tile;
  pool_.parallel_for(thread, layer.gate_up.weights().panels / 2, [&](int j) {
    kernels_.gemm(layer.gate_up.weights(), x, rows_, 2 * j, 2 * j + 2, tile, 2 * panel);
    for (int m = 0; m < rows_; m++)
      kernels_.activate(stack_.spec_.activation, tile + m * 2 * panel, tile + (m * 2 + 1) * panel, panel,
                        space_.inner + m * space_.inner_stride + j * panel);
  });
  pool_.barrier();
  const Operand inner = convert(thread, layer.down, space_.inner, space_.inner_stride, layer.spec.intermediate);
  project_rows(thread, layer.down, inner, space_.y);
  pool_.barrier();
}

// The last residual, the final norm, and the output head where logits are asked for.
void Pass::finish(int thread, Pending pending) {
  for_each_row(thread, rows_, [&](int m) { add_pending(thread, m, pending); });
  const int rows = static_cast<int>(chunk_->logits_token.size());
  if (!rows) return;
  const StackSpec& spec = stack_.spec_;
  const size_t width = spec.hidden;
  for_each_row(thread, rows, [&](int r) {
    if (!replicated_ || thread == 0)
      kernels_.rms_norm(residual(thread, chunk_->logits_token[r]), stack_.final_norm_.data(), spec.eps, spec.hidden,
                        output_.hidden + chunk_->logits_row[r] * width);
  });
  if (!output_.logits && !output_.largest) return;
  const Operand x = prepare(thread, rows, stack_.head_, spec.hidden, stack_.final_norm_.data(),
                            [&](int r) { return residual(thread, chunk_->logits_token[r]); });
  logits(thread, x, rows, chunk_->logits_row.data());
}

void Pass::logits(int thread, const Operand& x, int rows, const int64_t* at) {
  const int panel = kernels_.panel;
  const int64_t vocabulary = stack_.spec_.vocabulary;
  const Workspace::Local& local = space_.local[thread];
  float* tile = local.tile;
  pool_.parallel_for(thread, stack_.head_.weights().panels, [&](int64_t p) {
    kernels_.gemm(stack_.head_.weights(), x, rows, static_cast<int>(p), static_cast<int>(p) + 1, tile, panel);
    const int64_t count = std::min<int64_t>(panel, vocabulary - p * panel);
    for (int r = 0; r < rows; r++) {
      if (stack_.spec_.softcap > 0) kernels_.softcap(tile + r * panel, count, stack_.spec_.softcap);
      if (output_.logits)
        std::memcpy(output_.logits + at[r] * vocabulary + p * panel, tile + r * panel, count * sizeof(float));
      if (output_.largest)
        kernels_.keep_larger(tile + r * panel, count, static_cast<int32_t>(p), local.best + r * panel,
                             local.from + r * panel);
    }
  });
}

// The largest logits of all threads' panels; of equal ones the first.
void Pass::write_largest() const {
  const int panel = kernels_.panel;
  for (size_t r = 0; r < chunk_->logits_row.size(); r++) {
    float most = -std::numeric_limits<float>::infinity();
    int64_t column = -1;
    for (const Workspace::Local& local : space_.local) {
      for (size_t c = r * panel; c < (r + 1) * panel; c++) {
        if (local.from[c] < 0) continue;
        const int64_t here = int64_t{local.from[c]} * panel + static_cast<int64_t>(c - r * panel);
        if (local.best[c] > most || (local.best[c] == most && here < column) || std::isnan(local.best[c])) {
          most = local.best[c];
          column = here;
        }
      }
    }
    output_.largest[chunk_->logits_row[r]] = std::isfinite(most) ? column : -1;
  }
}

// ------------------------------------------------------------------------------------------------ other passes

void Pass::project(const Chunk& chunk, const float* hidden) {
  chunk_ = &chunk;
  if (stack_.layers_.empty()) return;
  allocate(chunk.count, 0);
  const int width = stack_.spec_.hidden;
  // No layer applies its norm here, so layers of one format in a row can use the same operand.
  for (size_t begin = 0, end; begin < stack_.layers_.size(); begin = end) {
    const DType dtype = stack_.layers_[begin].spec.qkv;
    std::vector<std::array<int, 3>> items;  // layer, key/value head, part
    for (end = begin; end < stack_.layers_.size() && stack_.layers_[end].spec.qkv == dtype; end++)
      for (int kv = 0; kv < stack_.layers_[end].spec.kv_heads; kv++)
        for (int part = stack_.layers_[end].group; part < stack_.layers_[end].parts; part++)
          items.push_back({static_cast<int>(end), kv, part});
    pool_.run([&](int thread) {
      const Operand x = prepare(thread, rows_, stack_.layers_[begin].qkv, width, nullptr, [&](int m) {
        return hidden + (chunk_->first + m) * static_cast<size_t>(width);
      });
      pool_.parallel_for(thread, static_cast<int>(items.size()), [&](int i) {
        project_head(thread, items[i][0], x, items[i][1], items[i][2]);
      });
    });
  }
}

void Pass::unembed(const float* hidden, int64_t rows) {
  for (int64_t done = 0; done < rows; done += kChunkRows) {
    const int count = static_cast<int>(std::min<int64_t>(kChunkRows, rows - done));
    allocate(count, 0);
    std::vector<int64_t> at(count);
    for (int r = 0; r < count; r++) at[r] = done + r;
    const size_t width = stack_.spec_.hidden;
    pool_.run([&](int thread) {
      const Operand x = prepare(thread, count, stack_.head_, stack_.spec_.hidden, nullptr,
                                [&](int r) { return hidden + (done + r) * width; });
      logits(thread, x, count, at.data());
    });
  }
}

}  // namespace outrider
