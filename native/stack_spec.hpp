// The shape of a decoder stack.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace outrider {

struct RopeSpec {
  std::vector<double> inverse_frequencies;  // head width / 2
  double scale = 1.0;
};

struct LayerSpec {
  DType qkv = DType::f32, out = DType::f32, gate_up = DType::f32, down = DType::f32;
  int heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0;
  int rope = 0;        // index into StackSpec::ropes
  int64_t window = 0;  // 0: unlimited
  float attention_scale = 1.0f;
  bool qk_norm = false, v_norm = false, value_is_key = false;
  float scalar = 1.0f;
};

struct StackSpec {
  DType dtype = DType::f32;  // of keys and values: f32 where it is f32, else bf16
  DType head = DType::f32, embedding = DType::f32;  // embedding: f32, bf16 or a block format
  bool tied = false;         // the embedding's rows are read from the head; block formats only
  std::string isa;  // empty: what OUTRIDER_ISA says, else the best this processor has
  int hidden = 0, input_width = 0;
  int embeddings = 0;  // rows of the embedding; 0: none
  int vocabulary = 0;  // rows of the output head; 0: none
  float eps = 1e-6f, embedding_scale = 1.0f, softcap = 0.0f;
  Activation activation = Activation::silu;
  bool sandwich = false, bias = false;  // bias: every linear of the layers has room for one
  std::vector<RopeSpec> ropes;
  std::vector<LayerSpec> layers;
};

}  // namespace outrider
