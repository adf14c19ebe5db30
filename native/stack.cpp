#include "stack.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "pass.hpp"
#include "threadpool.hpp"

namespace outrider {

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

[[noreturn]] void refuse_room(const KVCache& cache, int64_t slot) {
  throw NoRoom("slot " + std::to_string(slot) + " has room to write positions " + std::to_string(cache.fixed(slot)) +
               " to " + std::to_string(cache.room(slot) - 1) + " only");
}

void expect(bool fits, const std::string& what, int64_t got_a, int64_t got_b, int64_t want_a, int64_t want_b) {
  if (fits) return;
  refuse(what + ": got shape [" + std::to_string(got_a) + ", " + std::to_string(got_b) + "], expected [" +
         std::to_string(want_a) + ", " + std::to_string(want_b) + "]");
}

}  // namespace

// ------------------------------------------------------------------------------------------------ loading

Stack::Stack(StackSpec spec) : spec_(std::move(spec)), kernels_(find_kernels(spec_.isa)) {
  const int panel = kernels_.panel;
  for (const RopeSpec& rope : spec_.ropes) ropes_.push_back({rope, {}, {}});
  for (size_t i = 0; i < spec_.layers.size(); i++) {
    const LayerSpec& s = spec_.layers[i];
    if (s.head_dim < 2 || s.head_dim % 2 || s.head_dim > 512) refuse("head_dim must be even, at most 512");
    if (s.kv_heads < 1 || s.heads % s.kv_heads) refuse("num_heads must be a multiple of num_kv_heads");
    if (static_cast<int>(spec_.ropes[s.rope].inverse_frequencies.size()) * 2 != s.head_dim)
      refuse("inverse_frequencies must hold head_dim / 2 values");
    Layer layer;
    layer.spec = s;
    layer.head_pad = padded(s.head_dim);
    layer.group = s.heads / s.kv_heads;
    layer.parts = layer.group + (s.value_is_key ? 1 : 2);
    const int inner = i == 0 && spec_.input_width ? spec_.input_width : spec_.hidden;
    const int head_panels = layer.head_pad / panel;
    layer.qkv = Linear(arena_, kernels_, s.qkv, inner, s.kv_heads * layer.parts * head_panels, spec_.bias);
    layer.out = Linear(arena_, kernels_, s.out, s.heads * s.head_dim, padded(spec_.hidden) / panel, spec_.bias);
    layer.gate_up = Linear(arena_, kernels_, s.gate_up, spec_.hidden, 2 * padded(s.intermediate) / panel, spec_.bias);
    layer.down = Linear(arena_, kernels_, s.down, s.intermediate, padded(spec_.hidden) / panel, spec_.bias);
    layer.v_norm.assign(s.v_norm ? s.head_dim : 0, 1.0f);
    layers_.push_back(std::move(layer));
  }
  if (spec_.vocabulary)
    head_ = Linear(arena_, kernels_, spec_.head, spec_.hidden, padded(spec_.vocabulary) / panel, false);
  if (spec_.embeddings) {
    const size_t count = static_cast<size_t>(spec_.embeddings) * spec_.hidden;
    if (spec_.tied) {
      if (!is_blocks(spec_.head) || spec_.embeddings != spec_.vocabulary)
        refuse("a tied embedding needs a head in a block format with as many rows");
    } else if (is_blocks(spec_.embedding)) {
      embedding_ = Linear(arena_, kernels_, spec_.embedding, spec_.hidden, padded(spec_.embeddings) / panel, false);
    } else if (spec_.embedding == DType::f32) {
      embedding_f32_ = arena_.take<float>(count);
    } else {
      embedding_bf16_ = arena_.take<uint16_t>(count);
    }
  }
}

void Stack::set_norm(int layer, const std::string& name, const float* gain, int64_t size) {
  std::vector<float>* to = nullptr;
  int64_t width = spec_.hidden;
  if (layer < 0) {
    to = name == "norm" ? &final_norm_ : nullptr;
  } else {
    Layer& l = layers_.at(layer);
    if (name == "input_norm") to = &l.input_norm;
    if (name == "mlp_norm") to = &l.mlp_norm;
    if (name == "attention_out_norm") to = &l.attention_out_norm;
    if (name == "mlp_out_norm") to = &l.mlp_out_norm;
    if (name == "q_norm") to = &l.q_norm;
    if (name == "k_norm") to = &l.k_norm;
    if (name == "q_norm" || name == "k_norm") width = l.spec.head_dim;
  }
  if (!to) refuse("unknown norm " + name);
  expect(size == width, name, 1, size, 1, width);
  to->assign(gain, gain + size);
}

// Packs rows of a matrix into the columns of every `step`-th panel, the first of them column 0 of `first_panel`.
void Stack::fill(Linear& linear, int first_panel, const Rows& rows, const std::string& name, int step) {
  if (!linear.takes(rows)) refuse(name + " is given in a format that this matrix was not made for");
  const int panel = kernels_.panel;
  const auto pool = shared_pool();
  pool->run([&](int thread) {
    pool->parallel_for(thread, (rows.count + panel - 1) / panel, [&](int64_t p) {
      linear.fill(first_panel + static_cast<int>(p) * step,
                  rows.slice(p * panel, std::min<int64_t>(panel, rows.count - p * panel)));
    });
  });
}

void Stack::set_linear(int layer, const std::string& name, const Rows& rows) {
  Layer& l = layers_.at(layer);
  const LayerSpec& s = l.spec;
  const int head_panels = l.head_pad / kernels_.panel;
  const int64_t input = layer == 0 && spec_.input_width ? spec_.input_width : spec_.hidden;
  const std::string full = "layers." + std::to_string(layer) + "." + name + ".weight";
  const auto shape = [&](int64_t outputs, int64_t inner) {
    expect(rows.count == outputs && rows.inner == inner, full, rows.count, rows.inner, outputs, inner);
  };
  // Heads are stored group by group (queries, key, value), so that the thread that projects a key/value head also has
  // the queries that attend to it.
  const auto fill_heads = [&](int heads, int per_group, int part) {
    shape(static_cast<int64_t>(heads) * s.head_dim, input);
    for (int h = 0; h < heads; h++) {
      const int column = h / per_group * l.parts + part + h % per_group;  // in heads
      fill(l.qkv, column * head_panels, rows.slice(static_cast<int64_t>(h) * s.head_dim, s.head_dim), full);
    }
  };
  // Gate and up panels alternate, so that a thread can multiply the two as soon as it has computed them.
  const auto fill_interleaved = [&](int offset) {
    shape(s.intermediate, spec_.hidden);
    fill(l.gate_up, offset, rows, full, 2);
  };
  if (name == "q") {
    fill_heads(s.heads, l.group, 0);
  } else if (name == "k") {
    fill_heads(s.kv_heads, 1, l.group);
  } else if (name == "v" && !s.value_is_key) {
    fill_heads(s.kv_heads, 1, l.group + 1);
  } else if (name == "o") {
    shape(spec_.hidden, static_cast<int64_t>(s.heads) * s.head_dim);
    fill(l.out, 0, rows, full);
  } else if (name == "gate") {
    fill_interleaved(0);
  } else if (name == "up") {
    fill_interleaved(1);
  } else if (name == "down") {
    shape(spec_.hidden, s.intermediate);
    fill(l.down, 0, rows, full);
  } else {
    refuse("unknown linear " + name);
  }
}

void Stack::set_embedding(const Rows& rows, int64_t first) {
  const int64_t end = first + rows.count;
  expect(first >= 0 && end <= spec_.embeddings && rows.inner == spec_.hidden, "embed.weight", end, rows.inner,
         spec_.embeddings, spec_.hidden);
  if (spec_.tied) refuse("a tied embedding is set with the head");
  if (is_blocks(spec_.embedding)) {
    if (first % kernels_.panel) refuse("embed.weight must be given from a multiple of 64 rows on");
    return fill(embedding_, static_cast<int>(first / kernels_.panel), rows, "embed.weight");
  }
  if (rows.count && !rows.weight) refuse("embed.weight is given in a format that this stack was not made for");
  const int64_t count = rows.count * rows.inner, at = first * rows.inner;
  if (embedding_f32_)
    std::copy(rows.weight, rows.weight + count, embedding_f32_ + at);
  else
    std::transform(rows.weight, rows.weight + count, embedding_bf16_ + at, bf16_bits);
}

void Stack::set_head(const Rows& rows, int64_t first) {
  const int64_t end = first + rows.count;
  expect(first >= 0 && end <= spec_.vocabulary && rows.inner == spec_.hidden, "head.weight", end, rows.inner,
         spec_.vocabulary, spec_.hidden);
  if (first % kernels_.panel) refuse("head.weight must be given from a multiple of 64 rows on");
  fill(head_, static_cast<int>(first / kernels_.panel), rows, "head.weight");
}

// ------------------------------------------------------------------------------------------------ cache and checks

std::shared_ptr<KVCache> Stack::new_cache(int slots, int64_t capacity, int64_t pages, bool int8) {
  if (slots < 1 || capacity < 1 || pages < 1) refuse("a cache needs at least one slot and room for one token");
  const std::lock_guard<std::mutex> lock(pass_mutex_);
  for (RopeTable& table : ropes_) {
    const std::vector<double>& inverse = table.spec.inverse_frequencies;
    const int64_t half = static_cast<int64_t>(inverse.size());
    for (int64_t p = half ? static_cast<int64_t>(table.cosine.size()) / half : 0; p < capacity; p++)
      for (double frequency : inverse) {
        const double angle = static_cast<double>(p) * frequency;
        table.cosine.push_back(static_cast<float>(std::cos(angle) * table.spec.scale));
        table.sine.push_back(static_cast<float>(std::sin(angle) * table.spec.scale));
      }
  }
  const DType kind = int8 ? DType::i8 : spec_.dtype == DType::f32 ? DType::f32 : DType::bf16;
  return std::make_shared<KVCache>(spec_, kind, kernels_.panel, slots, capacity, pages);
}

void Stack::check(const Batch& batch, const KVCache& cache, bool check_tokens) const {
  if (batch.offsets[0] != 0 || batch.offsets[batch.rows] != batch.count)
    refuse("offsets must run from 0 to the number of tokens (" + std::to_string(batch.count) + "), got " +
           std::to_string(batch.offsets[0]) + " to " + std::to_string(batch.offsets[batch.rows]));
  std::vector<char> seen(cache.slots(), 0);
  int64_t lacking = -1;
  for (int64_t b = 0; b < batch.rows; b++) {
    const int64_t slot = batch.slots[b], first = batch.offsets[b], last = batch.offsets[b + 1];
    if (last < first) refuse("offsets must not decrease");
    if (slot < 0 || slot >= cache.slots() || !cache.is_open(slot))
      refuse("slot " + std::to_string(slot) + " is not open");
    if (seen[slot]++) refuse("slot " + std::to_string(slot) + " appears twice in one batch");
    if (first == last) continue;
    const int64_t start = batch.positions[first];
    if (start < 0 || start > cache.lengths()[slot])
      refuse("row " + std::to_string(b) + " starts at position " + std::to_string(start) + ", but slot " +
             std::to_string(slot) + " holds " + std::to_string(cache.lengths()[slot]) + " tokens");
    if (start + (last - first) > cache.capacity())
      throw std::out_of_range("row " + std::to_string(b) + " reaches position " + std::to_string(start + last - first - 1) +
             ", past the capacity of " + std::to_string(cache.capacity()) + " tokens");
    if (start < cache.fixed(slot) || start + (last - first) > cache.room(slot)) lacking = slot;
    for (int64_t t = first; t < last; t++)
      if (batch.positions[t] != start + (t - first)) refuse("positions must be consecutive within a row");
  }
  if (check_tokens && !spec_.embeddings) refuse("this stack has no embedding: give hidden states");
  for (int64_t t = 0; check_tokens && t < batch.count; t++)
    if (batch.tokens[t] < 0 || batch.tokens[t] >= spec_.embeddings)
      refuse("token id " + std::to_string(batch.tokens[t]) + " is outside 0 .. " + std::to_string(spec_.embeddings - 1));
  // Last: the caller finds room and calls again, and then everything else must be in order.
  if (lacking >= 0) refuse_room(cache, lacking);
}

void expect_room(const KVCache& cache, int64_t slot, int64_t first, int64_t end) {
  if (end > cache.capacity())
    throw std::out_of_range("slot " + std::to_string(slot) + " reaches position " + std::to_string(end - 1) +
                            ", past the capacity of " + std::to_string(cache.capacity()) + " tokens");
  if (first < cache.fixed(slot) || end > cache.room(slot)) refuse_room(cache, slot);
}

void Stack::embed(const int64_t* tokens, int64_t count, float* out) const {
  if (!spec_.embeddings) refuse("this stack has no embedding");
  const int width = spec_.hidden;
  for (int64_t t = 0; t < count; t++, out += width) {
    if (tokens[t] < 0 || tokens[t] >= spec_.embeddings)
      refuse("token id " + std::to_string(tokens[t]) + " is outside 0 .. " + std::to_string(spec_.embeddings - 1));
    const size_t row = static_cast<size_t>(tokens[t]) * width;
    if (spec_.tied || is_blocks(spec_.embedding)) {
      (spec_.tied ? head_ : embedding_).unpack(tokens[t], out);
      if (spec_.embedding_scale != 1.0f)
        for (int d = 0; d < width; d++) out[d] *= spec_.embedding_scale;
    } else if (embedding_f32_)
      for (int d = 0; d < width; d++) out[d] = embedding_f32_[row + d] * spec_.embedding_scale;
    else
      for (int d = 0; d < width; d++) out[d] = bf16_value(embedding_bf16_[row + d]) * spec_.embedding_scale;
  }
}

// ------------------------------------------------------------------------------------------------ forward passes

namespace {

// Splits a batch into chunks of at most kChunkRows tokens. Without the causal mask a row is never split: all of its
// tokens attend to each other.
std::vector<Chunk> chunks_of(const Batch& batch, bool causal) {
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < batch.rows; b++) {
    for (int64_t t = batch.offsets[b]; t < batch.offsets[b + 1];) {
      const int64_t left = batch.offsets[b + 1] - t;
      const bool full = !chunks.empty() && (causal ? chunks.back().count >= kChunkRows
                                                   : chunks.back().count + left > kChunkRows);
      if (chunks.empty() || full) {
        chunks.emplace_back();
        chunks.back().first = t;
      }
      Chunk& chunk = chunks.back();
      const int64_t count = causal ? std::min<int64_t>(left, kChunkRows - chunk.count) : left;
      chunk.segments.push_back({static_cast<int>(batch.slots[b]), batch.positions[t], chunk.count,
                                static_cast<int>(count)});
      chunk.count += static_cast<int>(count);
      t += count;
    }
  }
  return chunks;
}

void set_lengths(const Batch& batch, KVCache& cache) {
  for (int64_t b = 0; b < batch.rows; b++)
    if (batch.offsets[b + 1] > batch.offsets[b])
      cache.lengths()[batch.slots[b]] = batch.positions[batch.offsets[b + 1] - 1] + 1;
}

}  // namespace

void Stack::forward(const Batch& batch, KVCache& cache, const PassInput& input, const PassOutput& output) {
  const std::lock_guard<std::mutex> lock(pass_mutex_);
  check(batch, cache, !input.hidden);
  std::vector<Chunk> chunks = chunks_of(batch, input.causal);
  for (int64_t r = 0; r < output.logits_rows; r++) {
    const int64_t token = output.logits_at ? output.logits_at[r] : r;
    if (token < 0 || token >= batch.count)
      throw std::invalid_argument("logits_at holds " + std::to_string(token) + ", but the batch has " +
                                  std::to_string(batch.count) + " tokens");
    const auto after = std::upper_bound(chunks.begin(), chunks.end(), token,
                                        [](int64_t t, const Chunk& chunk) { return t < chunk.first; });
    Chunk& chunk = *(after - 1);
    chunk.logits_token.push_back(static_cast<int>(token - chunk.first));
    chunk.logits_row.push_back(r);
  }
  const auto pool = shared_pool();
  Pass pass(*this, &cache, *pool, input, output);
  for (const Chunk& chunk : chunks) pass.forward(batch, chunk);
  set_lengths(batch, cache);
}

void Stack::project(const Batch& batch, KVCache& cache, const float* hidden) {
  const std::lock_guard<std::mutex> lock(pass_mutex_);
  check(batch, cache, false);
  const auto pool = shared_pool();
  const PassInput input;
  const PassOutput output;
  Pass pass(*this, &cache, *pool, input, output);
  for (const Chunk& chunk : chunks_of(batch, true)) pass.project(chunk, hidden);
  set_lengths(batch, cache);
}

void Stack::unembed(const float* hidden, int64_t rows, float* logits) {
  const std::lock_guard<std::mutex> lock(pass_mutex_);
  const auto pool = shared_pool();
  const PassInput input;
  PassOutput output;
  output.logits = logits;
  Pass pass(*this, nullptr, *pool, input, output);
  pass.unembed(hidden, rows);
}

}  // namespace outrider
