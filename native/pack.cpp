#include "pack.hpp"

#include <algorithm>
#include <cmath>

namespace outrider {

uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

uint16_t half_bits(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x477ff000)  // rounds to 65,536 or more, or is no number
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  else if (magnitude < 0x38800000)  // subnormal: 0.5 has its last bit at fp16's smallest value
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  else
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return static_cast<uint16_t>(sign | half);
}

float half_value(uint16_t bits) {
  const float magnitude = float_of(static_cast<uint32_t>(bits & 0x7fff) << 13) * 0x1p112f;
  return bits & 0x8000 ? -magnitude : magnitude;
}

Rows Rows::slice(int64_t first, int64_t rows) const {
  const auto move = [](auto* data, int64_t by) { return data ? data + by : nullptr; };
  Rows part = *this;
  part.count = rows;
  part.weight = move(weight, first * inner);
  part.values = move(values, first * inner);
  part.scale = move(scale, first * (inner / kGroup));
  part.minimum = move(minimum, first * (inner / kGroup));
  part.bias = move(bias, first);
  return part;
}

void pack_row(DType dtype, const float* row, int width, int inner, int panel, char* to) {
  const int half = panel / 2;
  for (int k = 0; k < inner; k++) {
    const float value = k < width ? row[k] : 0.0f;
    const int within = k % panel;
    if (dtype == DType::f32)
      reinterpret_cast<float*>(to)[k] = value;
    else
      reinterpret_cast<uint16_t*>(to)[k - within + within % half * 2 + within / half] = bf16_bits(value);
  }
}

void unpack_row(DType dtype, const char* row, int inner, int panel, float* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, row, inner * sizeof(float));
    return;
  }
  const int half = panel / 2;
  const auto* pairs = reinterpret_cast<const uint16_t*>(row);
  for (int k = 0; k < inner; k += panel)
    for (int i = 0; i < half; i++) {
      to[k + i] = bf16_value(pairs[k + 2 * i]);
      to[k + half + i] = bf16_value(pairs[k + 2 * i + 1]);
    }
}

namespace {

// Bytes of the scales and minima of one column's group, and of all of it.
int header_bytes(DType dtype) { return has_minimum(dtype) ? 4 : 2; }
int group_bytes(DType dtype) { return header_bytes(dtype) + (is_nibbles(dtype) ? kGroup / 2 : kGroup); }

size_t bytes_of_panel(DType dtype, int inner, int columns) {
  if (has_groups(dtype)) return static_cast<size_t>(inner) / kGroup * columns * group_bytes(dtype);
  return static_cast<size_t>(inner) / k_per_step(dtype) * columns * 4;
}

// The int4 scale of one group: of a few candidates around (largest / -8), the one with the least squared error. The
// range -8 .. 7 is asymmetric, so the value of largest magnitude is mapped to the negative side.
float group_scale(const float* w, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; i++)
    if (std::fabs(w[i]) > std::fabs(largest)) largest = w[i];
  if (largest == 0.0f) return 0.0f;
  float best = 0.0f, least = INFINITY;
  for (float side : {8.0f, 7.7f, 7.4f, 7.0f, 8.4f, -7.0f, -7.3f}) {
    const float scale = bf16_value(bf16_bits(largest / -side));
    if (scale == 0.0f) continue;
    const float inverse = 1.0f / scale;
    float error = 0.0f;
    for (int i = 0; i < count; i++) {
      const float q = std::min(7.0f, std::max(-8.0f, std::nearbyint(w[i] * inverse)));
      const float off = w[i] - q * scale;
      error += off * off;
    }
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

}  // namespace

Linear::Linear(Arena& arena, const Kernels& kernels, DType dtype, int inner, int panels, bool bias)
    : columns_(kernels.panel), width_(inner) {
  const int panel = kernels.panel;
  weights_.dtype = dtype;
  weights_.inner = static_cast<int>(round_up(inner, kernels.inner_unit(dtype)));
  weights_.panels = panels;
  weights_.panel_bytes = bytes_of_panel(dtype, weights_.inner, panel);
  data_ = arena.take<char>(weights_.panel_bytes * panels);
  if (dtype == DType::i8) scale_ = arena.take<float>(static_cast<size_t>(panels) * panel);
  if (bias) bias_ = arena.take<float>(static_cast<size_t>(panels) * panel);
  weights_.data = data_;
  weights_.scale = scale_;
  weights_.bias = bias_;
}

void Linear::fill(int p, const Rows& rows) {
  char* to = data_ + static_cast<size_t>(p) * weights_.panel_bytes;
  const int first = p * columns_;
  for (int c = 0; c < rows.count; c++) {
    const float* row = rows.weight ? rows.weight + static_cast<size_t>(c) * width_ : nullptr;
    if (rows.bias) bias_[first + c] = rows.bias[c];
    switch (weights_.dtype) {
      case DType::f32:
        for (int k = 0; k < width_; k++) reinterpret_cast<float*>(to)[static_cast<size_t>(k) * columns_ + c] = row[k];
        break;
      case DType::bf16:
        for (int k = 0; k < width_; k++)
          reinterpret_cast<uint16_t*>(to)[(static_cast<size_t>(k / 2) * columns_ + c) * 2 + k % 2] = bf16_bits(row[k]);
        break;
      case DType::i8: {
        float largest = 0.0f;
        for (int k = 0; k < width_; k++) largest = std::max(largest, std::fabs(row[k]));
        const float scale = largest / 127.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        scale_[first + c] = scale;
        for (int k = 0; k < weights_.inner; k++) {
          const int q = k < width_ ? static_cast<int>(std::nearbyint(row[k] * inverse)) : 0;
          to[(static_cast<size_t>(k / 4) * columns_ + c) * 4 + k % 4] = static_cast<char>(q + kInt8Zero);
        }
        break;
      }
      case DType::i4: fill_int4(to, row, c, width_); break;
      default: fill_blocks(to, rows.slice(c, 1), c);
    }
  }
}

void Linear::fill_int4(char* to, const float* row, int column, int width) {
  const int half = columns_ / 2, lane = column % half;
  const size_t group_bytes = static_cast<size_t>(columns_) * (2 + kGroup / 2);
  for (int g = 0; g * kGroup < width; g++) {
    char* group = to + g * group_bytes;
    const int count = std::min(kGroup, width - g * kGroup);
    const float scale = group_scale(row + g * kGroup, count), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    reinterpret_cast<uint16_t*>(group)[lane * 2 + (column >= half)] = bf16_bits(scale);
    for (int k = 0; k < kGroup; k++) {
      const float value = k < count ? std::nearbyint(row[g * kGroup + k] * inverse) : 0.0f;
      const int q = static_cast<int>(std::min(7.0f, std::max(-8.0f, value))) + kInt4Zero;
      char& pair = group[static_cast<size_t>(columns_) * 2 + (static_cast<size_t>(k / 4) * half + lane) * 4 + k % 4];
      pair = static_cast<char>(column < half ? (pair & 0xf0) | q : (pair & 0x0f) | q << 4);
    }
  }
}

bool Linear::takes(const Rows& rows) const {
  const DType dtype = weights_.dtype;
  if (!rows.count) return true;
  if (rows.weight) return !is_blocks(dtype) || !is_nibbles(dtype);
  return rows.kind == dtype || dtype == DType::q8_min;
}

namespace {

// One block of a row as a format stores it.
struct Block {
  float scale = 0.0f, minimum = 0.0f;
  int values[kGroup] = {};
};

// 8-bit values with the scale that fp16 can hold.
Block quantised(const float* w, int count) {
  Block block;
  float largest = 0.0f;
  for (int i = 0; i < count; i++) largest = std::max(largest, std::fabs(w[i]));
  block.scale = half_value(half_bits(std::min(largest / 127.0f, 65504.0f)));
  const float inverse = block.scale > 0.0f ? 1.0f / block.scale : 0.0f;
  for (int i = 0; i < count; i++)
    block.values[i] = static_cast<int>(std::min(127.0f, std::max(-127.0f, std::nearbyint(w[i] * inverse))));
  return block;
}

// The values as they are given; in q8_min those of q4_0 become signed ones without a minimum.
Block given(const Rows& rows, int group) {
  Block block;
  block.scale = rows.scale[group];
  if (rows.kind == DType::q4_1) block.minimum = rows.minimum[group];
  const uint8_t* values = rows.values + static_cast<size_t>(group) * kGroup;
  for (int i = 0; i < kGroup; i++) {
    if (rows.kind == DType::q8_0)
      block.values[i] = static_cast<int8_t>(values[i]);
    else
      block.values[i] = values[i] - (rows.kind == DType::q4_0 ? kInt4Zero : 0);
  }
  return block;
}

void put_half(char* to, float value) {
  const uint16_t bits = half_bits(value);
  std::memcpy(to, &bits, 2);
}

float take_half(const char* from) {
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return half_value(bits);
}

}  // namespace

void Linear::fill_blocks(char* to, const Rows& rows, int column) {
  const DType dtype = weights_.dtype;
  const int half = columns_ / 2, zero = zero_of(dtype);
  for (int g = 0; g * kGroup < width_; g++, to += static_cast<size_t>(columns_) * group_bytes(dtype)) {
    const Block block = rows.weight ? quantised(rows.weight + g * kGroup, std::min(kGroup, width_ - g * kGroup))
                                    : given(rows, g);
    put_half(to + 2 * column, block.scale);
    if (has_minimum(dtype)) put_half(to + 2 * (columns_ + column), block.minimum);
    char* values = to + static_cast<size_t>(columns_) * header_bytes(dtype);
    for (int k = 0; k < kGroup; k++) {
      const int q = block.values[k] + zero;
      if (is_nibbles(dtype)) {
        char& pair = values[(static_cast<size_t>(k / 4) * half + column % half) * 4 + k % 4];
        pair = static_cast<char>(column < half ? (pair & 0xf0) | q : (pair & 0x0f) | q << 4);
      } else {
        values[(static_cast<size_t>(k / 4) * columns_ + column) * 4 + k % 4] = static_cast<char>(q);
      }
    }
  }
}

void Linear::unpack(int64_t row, float* to) const {
  const DType dtype = weights_.dtype;
  const int column = static_cast<int>(row % columns_), half = columns_ / 2, zero = zero_of(dtype);
  const char* from = data_ + row / columns_ * weights_.panel_bytes;
  for (int g = 0; g * kGroup < width_; g++, from += static_cast<size_t>(columns_) * group_bytes(dtype)) {
    const float scale = take_half(from + 2 * column);
    const float minimum = has_minimum(dtype) ? take_half(from + 2 * (columns_ + column)) : 0.0f;
    const char* values = from + static_cast<size_t>(columns_) * header_bytes(dtype);
    for (int k = 0; k < std::min(kGroup, width_ - g * kGroup); k++) {
      int q;
      if (is_nibbles(dtype))
        q = values[(static_cast<size_t>(k / 4) * half + column % half) * 4 + k % 4] >> (column < half ? 0 : 4) & 15;
      else
        q = static_cast<uint8_t>(values[(static_cast<size_t>(k / 4) * columns_ + column) * 4 + k % 4]);
      const float product = static_cast<float>(q - zero) * scale;
      to[g * kGroup + k] = has_minimum(dtype) ? product + minimum : product;
    }
  }
}

}  // namespace outrider
