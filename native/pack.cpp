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

int padded_inner(DType dtype, int inner) {
  return static_cast<int>(round_up(inner, dtype == DType::i4 ? kGroup : k_per_step(dtype)));
}

size_t bytes_of_panel(DType dtype, int inner, int columns) {
  if (dtype == DType::i4) return static_cast<size_t>(inner) / kGroup * columns * (2 + kGroup / 2);
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

Linear::Linear(Arena& arena, DType dtype, int inner, int panels, int panel, bool bias) : columns_(panel), width_(inner) {
  weights_.dtype = dtype;
  weights_.inner = padded_inner(dtype, inner);
  weights_.panels = panels;
  weights_.panel_bytes = bytes_of_panel(dtype, weights_.inner, panel);
  data_ = arena.take<char>(weights_.panel_bytes * panels);
  if (dtype == DType::i8) scale_ = arena.take<float>(static_cast<size_t>(panels) * panel);
  if (bias) bias_ = arena.take<float>(static_cast<size_t>(panels) * panel);
  weights_.data = data_;
  weights_.scale = scale_;
  weights_.bias = bias_;
}

void Linear::fill(int p, const float* rows, int count, const float* bias) {
  char* to = data_ + static_cast<size_t>(p) * weights_.panel_bytes;
  const int first = p * columns_;
  for (int c = 0; c < count; c++) {
    const float* row = rows + static_cast<size_t>(c) * width_;
    if (bias) bias_[first + c] = bias[c];
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

}  // namespace outrider
