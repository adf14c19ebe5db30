// Whether matrix tiles compute what they should, tried on small whole numbers, whose sums are exact in any order.
#pragma once

#include "tile_gemm.hpp"

namespace outrider::OUTRIDER_ISA {

bool tiles_compute() {
  constexpr int kHeight = 20, kBytes = 64, kColumns = kVectors * kLanes;  // rows: more than one tile's
  const auto left = [](int m, int k) { return (7 * m + 3 * k) % 15 - 7; };
  const auto right = [](int k, int n) { return (5 * k + 11 * n) % 14; };
  const auto bfloat16 = [](int value) {
    const float wide = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  alignas(64) char x[kHeight * kBytes], w[16 * kStepBytes], sums[kBothHeights * kStepBytes];
  bool right_answers = true;
  for (const bool bytes : {true, false}) {
    const int size = bytes ? 1 : 2, together = 4 / size, inner = kBytes / size;
    for (int m = 0; m < kHeight; m++)
      for (int k = 0; k < inner; k++) {
        const uint16_t two = bfloat16(left(m, k));
        const int8_t one = static_cast<int8_t>(left(m, k));
        std::memcpy(x + m * kBytes + k * size, bytes ? static_cast<const void*>(&one) : &two, size);
      }
    for (int k = 0; k < inner; k++)
      for (int n = 0; n < kColumns; n++) {
        const uint16_t two = bfloat16(right(k, n));
        const uint8_t one = static_cast<uint8_t>(right(k, n));
        char* to = w + k / together * kStepBytes + n * 4 + k % together * size;
        std::memcpy(to, bytes ? static_cast<const void*>(&one) : &two, size);
      }
    {
      const Shapes shapes(kHeight, 16);
      zero_sums(shapes.two());
      if (bytes)
        multiply_tiles<true>(w, x, kBytes, shapes.two());
      else
        multiply_tiles<false>(w, x, kBytes, shapes.two());
      store_sums(sums, shapes.two());
    }
    for (int m = 0; m < kHeight; m++)
      for (int n = 0; n < kColumns; n++) {
        int expected = 0;
        for (int k = 0; k < inner; k++) expected += left(m, k) * right(k, n);
        int32_t exact;
        float real;
        std::memcpy(&exact, sums + m * kStepBytes + n * 4, 4);
        std::memcpy(&real, sums + m * kStepBytes + n * 4, 4);
        right_answers = right_answers && (bytes ? exact == expected : real == static_cast<float>(expected));
      }
  }
  return right_answers;
}

}  // namespace outrider::OUTRIDER_ISA
