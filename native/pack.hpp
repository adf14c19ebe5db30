// Packs matrices into the layout that the kernels read: panels of P output columns, quantised for int8 and int4.
#pragma once

#include <cstring>

#include "arena.hpp"
#include "kernels.hpp"

namespace outrider {

// A [outputs, inner] matrix being filled panel by panel; unfilled columns are zero.
class Linear {
 public:
  Linear() = default;
  // `panels` panels of `panel` columns each, memory from the arena.
  Linear(Arena& arena, DType dtype, int inner, int panels, int panel, bool bias);

  const Weights& weights() const { return weights_; }
  // Rows [count, inner] of float32 become the first columns of panel p; bias may be null. Different panels may be
  // filled by different threads.
  void fill(int p, const float* rows, int count, const float* bias);

 private:
  void fill_int4(char* to, const float* row, int column, int count);

  Weights weights_;
  int columns_ = 0;  // P
  int width_ = 0;    // inner as given, before padding
  char* data_ = nullptr;
  float* scale_ = nullptr;
  float* bias_ = nullptr;
};

uint16_t bf16_bits(float value);

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
