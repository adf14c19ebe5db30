// A decoder stack: its packed weights, and one forward pass over a ragged batch.
//
// Legend: B rows, T packed tokens, R rows of logits, V vocabulary, D model width, H heads, Hkv key/value heads, Dh head
// width, P panel columns. Padded widths are multiples of P; their padding stays zero.
#pragma once

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"
#include "kv_cache.hpp"
#include "pack.hpp"
#include "stack_spec.hpp"

namespace outrider {

struct Layer {
  LayerSpec spec;
  int head_pad = 0;  // Dh padded to P
  int group = 0;     // query heads per key/value head
  int parts = 0;     // heads of one group in qkv: its queries, the key, the value (unless the key is the value)
  Linear qkv, out, gate_up, down;
  std::vector<float> input_norm, mlp_norm, attention_out_norm, mlp_out_norm, q_norm, k_norm, v_norm;
};

struct RopeTable {
  RopeSpec spec;
  std::vector<float> cosine, sine;  // [positions, Dh / 2]
};

struct Batch {
  const int64_t *tokens, *positions, *slots, *offsets;
  int64_t rows, count;  // B, T
};

struct PassInput {
  const float* hidden = nullptr;    // [T, D], or [T, input_width]
  const float* residual = nullptr;  // [T, D] with input_width
  bool causal = true;
};

struct PassOutput {
  std::vector<int> aux_layers;         // residual after these layers; -1: the embedding
  float* features = nullptr;           // [T, aux_layers * D]
  const int64_t* logits_at = nullptr;  // [R]; null: all
  int64_t logits_rows = 0;
  float* hidden = nullptr;             // [R, D]
  float* logits = nullptr;             // [R, V] or null
  int64_t* largest = nullptr;          // [R] or null: the first of each row's largest logits; -1: that is not finite
};

// A slot has no page yet for what a pass wants to write, or only a shared one.
struct NoRoom : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws NoRoom unless a slot has pages of its own for positions [first, end).
void expect_room(const KVCache& cache, int64_t slot, int64_t first, int64_t end);

class Stack {
 public:
  explicit Stack(StackSpec spec);

  // Weights. Matrices are [outputs, inner]; norms are gains with any offset already added. Embedding and head may be
  // given in parts, from row `first` on, a multiple of P (which a multiple of 64 always is).
  void set_norm(int layer, const std::string& name, const float* gain, int64_t size);
  void set_linear(int layer, const std::string& name, const Rows& rows);
  void set_embedding(const Rows& rows, int64_t first);
  void set_head(const Rows& rows, int64_t first);

  // int8: keys and values in 8 bits with a scale per position and head, else float32 or bfloat16 (see StackSpec).
  std::shared_ptr<KVCache> new_cache(int slots, int64_t capacity, int64_t pages, bool int8);
  // Checks the batch, runs it through all layers, and appends its keys and values to the cache.
  void forward(const Batch& batch, KVCache& cache, const PassInput& input, const PassOutput& output);
  // Appends the keys and values that every layer makes of `hidden` [T, D], without the layers' norms.
  void project(const Batch& batch, KVCache& cache, const float* hidden);
  void unembed(const float* hidden, int64_t rows, float* logits);
  void embed(const int64_t* tokens, int64_t count, float* out) const;

  const StackSpec& spec() const { return spec_; }
  const Kernels& kernels() const { return kernels_; }
  size_t weight_bytes() const { return arena_.bytes(); }
  // All packed weights except norms: a stack of the same spec can be filled with a copy instead of packing again.
  const Arena& packed() const { return arena_; }

 private:
  friend class Pass;
  void check(const Batch& batch, const KVCache& cache, bool check_tokens) const;
  void fill(Linear& linear, int first_panel, const Rows& rows, const std::string& name, int step = 1);
  int padded(int64_t width) const { return static_cast<int>(round_up(width, kernels_.panel)); }

  StackSpec spec_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Layer> layers_;
  std::vector<RopeTable> ropes_;
  std::vector<float> final_norm_;
  Linear head_, embedding_;  // embedding_: block formats that are not tied
  float* embedding_f32_ = nullptr;
  uint16_t* embedding_bf16_ = nullptr;
  std::mutex pass_mutex_;  // one pass at a time: passes share scratch_ and the thread pool
  Region scratch_;
};

}  // namespace outrider
