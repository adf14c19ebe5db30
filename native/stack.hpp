// A decoder stack: its shape, its packed weights, and one pass over a ragged batch.
//
// Legend: B rows, T packed tokens, R rows of logits, V vocabulary, D width, H heads, Hkv key/value heads, Dh head
// width, P panel columns. Padded widths are multiples of P and their padding stays zero.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"
#include "pack.hpp"
#include "threadpool.hpp"

namespace outrider {

struct RopeSpec {
  std::vector<double> inverse_frequencies;  // Dh / 2
  double scale = 1.0;
};

struct LayerSpec {
  int heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0;
  int rope = 0;        // index into StackSpec::ropes
  int64_t window = 0;  // 0: unlimited
  float attention_scale = 1.0f;
  bool qk_norm = false, v_norm = false, value_is_key = false;
  float scalar = 1.0f;
};

struct StackSpec {
  DType dtype = DType::f32;
  std::string isa;  // empty: the best, or OUTRIDER_ISA
  int hidden = 0, input_width = 0;
  int embeddings = 0;  // rows of the embedding; 0: none
  int vocabulary = 0;  // rows of the head; 0: none
  float eps = 1e-6f, embedding_scale = 1.0f, softcap = 0.0f;
  Activation activation = Activation::silu;
  bool sandwich = false, bias = false;  // bias: room for one on every linear of the layers
  std::vector<RopeSpec> ropes;
  std::vector<LayerSpec> layers;
};

// Keys and values of every layer, slot by slot; positions are appended, and a length that shrinks forgets.
class Cache {
 public:
  Cache(const StackSpec& spec, DType dtype, int panel, int slots, int64_t capacity);

  int slots() const { return slots_; }
  int64_t capacity() const { return capacity_; }
  DType dtype() const { return dtype_; }
  std::vector<int64_t>& lengths() { return lengths_; }
  std::vector<char>& opened() { return opened_; }

  char* keys(int layer, int slot, int kv_head) const;
  char* values(int layer, int slot, int kv_head) const { return keys(layer, slot, kv_head) + key_bytes_[layer]; }
  int64_t padded_capacity() const { return padded_; }

 private:
  DType dtype_;
  int slots_;
  int64_t capacity_, padded_;
  std::vector<size_t> key_bytes_, head_bytes_, offsets_;
  std::vector<int> kv_heads_;
  std::vector<int64_t> lengths_;
  std::vector<char> opened_;
  Region memory_;
};

struct Layer {
  LayerSpec spec;
  int head_pad = 0, group = 0, parts = 0;  // parts: heads of one group in qkv (queries, key, value)
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
  std::vector<int> taps;
  float* features = nullptr;           // [T, taps * D]
  const int64_t* logits_at = nullptr;  // [R]; null: all
  int64_t logits_rows = 0;
  float* hidden = nullptr;             // [R, D]
  float* logits = nullptr;             // [R, V] or null
};

class Stack {
 public:
  explicit Stack(StackSpec spec);

  // Weights, one call each. Matrices are [outputs, inner] float32 rows; norms are gains, any offset added.
  void set_norm(int layer, const std::string& name, const float* gain, int64_t size);
  void set_linear(int layer, const std::string& name, const float* weight, int64_t outputs, int64_t inner,
                  const float* bias);
  void set_embedding(const float* weight, int64_t rows, int64_t width);
  void set_head(const float* weight, int64_t rows, int64_t width);

  std::shared_ptr<Cache> new_cache(int slots, int64_t capacity);
  void forward(const Batch& batch, Cache& cache, const PassInput& input, const PassOutput& output);
  void project(const Batch& batch, Cache& cache, const float* hidden);
  void unembed(const float* hidden, int64_t rows, float* logits);
  void embed(const int64_t* tokens, int64_t count, float* out) const;

  const StackSpec& spec() const { return spec_; }
  const Kernels& kernels() const { return kernels_; }
  size_t weight_bytes() const { return arena_.bytes(); }
  // All packed weights, norms aside: what a stack of the same spec may be filled with instead of packing anew.
  const Arena& packed() const { return arena_; }

 private:
  friend class Pass;
  void check(const Batch& batch, const Cache& cache, bool tokens) const;
  void fill(Linear& linear, int first_panel, const float* rows, int64_t count, int64_t inner, const float* bias);
  int padded(int64_t width) const { return static_cast<int>(round_up(width, kernels_.panel)); }

  StackSpec spec_;
  const Kernels& kernels_;
  Arena arena_;
  std::vector<Layer> layers_;
  std::vector<RopeTable> ropes_;
  std::vector<float> final_norm_;
  Linear head_;
  float* embedding_f32_ = nullptr;
  uint16_t* embedding_bf16_ = nullptr;
  std::mutex one_pass_;
  Region scratch_;
};

}  // namespace outrider
