// Packs matrices into the layout that the kernels read: panels of P output columns, quantised or in given blocks.
#pragma once

#include <cstring>

#include "arena.hpp"
#include "kernels.hpp"

namespace outrider {

// Rows [count, inner] of a matrix as they are given: float32, or the parts of a block format.
struct Rows {
  int64_t count = 0, inner = 0;
  const float* weight = nullptr;     // or, of a block format:
  DType kind = DType::f32;           // q8_0, q4_0 or q4_1
  const uint8_t* values = nullptr;   // [count, inner]: int8 for q8_0, else 0 to 15
  const float* scale = nullptr;      // [count, inner / kGroup], values of fp16
  const float* minimum = nullptr;    // the same; q4_1 only
  const float* bias = nullptr;       // [count] or null

  Rows slice(int64_t first, int64_t rows) const;
};

// A [outputs, inner] matrix being filled panel by panel; unfilled columns are zero.
class Linear {
 public:
  Linear() = default;
  // `panels` panels as the kernels read them, memory from the arena.
  Linear(Arena& arena, const Kernels& kernels, DType dtype, int inner, int panels, bool bias);

  const Weights& weights() const { return weights_; }
  // At most P rows become the first columns of panel p. Different panels may be filled by different threads. Block
  // formats take rows of their own kind, q8_min of any kind, and both 8-bit ones float32, which they quantise.
  void fill(int p, const Rows& rows);
  bool takes(const Rows& rows) const;
  // Row `row` of a block format, `inner` values in float32, rounded as the format's reference does.
  void unpack(int64_t row, float* to) const;

 private:
  void fill_int4(char* to, const float* row, int column, int count);
  void fill_blocks(char* to, const Rows& rows, int column);

  Weights weights_;
  int columns_ = 0;  // P
  int width_ = 0;    // inner as given, before padding
  char* data_ = nullptr;
  float* scale_ = nullptr;
  float* bias_ = nullptr;
};

uint16_t bf16_bits(float value);
uint16_t half_bits(float value);  // fp16, rounded to nearest even
float half_value(uint16_t bits);

// One row of a RowMajor matrix, padded with zeros to `inner`. bfloat16 values half a panel apart are stored as pairs.
void pack_row(DType dtype, const float* row, int width, int inner, int panel, char* to);
void unpack_row(DType dtype, const char* row, int inner, int panel, float* to);

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace outrider
