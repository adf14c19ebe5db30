// Whether two tables of kernels give the same bits for the products that matrix tiles compute.
#include <cmath>
#include <cstring>

#include "arena.hpp"
#include "kernels.hpp"
#include "pack.hpp"
#include "splitmix.hpp"

namespace outrider {

namespace {

constexpr int kInner = 128;  // whole tiles of every format, and groups
constexpr int kHeights[] = {3, 20};  // of one tile, and of two

// A product of `rows` rows with one panel, both of pseudo-random numbers. [rows, P]
float* multiply(Arena& arena, const Kernels& kernels, DType dtype, int rows) {
  Linear linear(arena, kernels, dtype, kInner, 1, false);
  uint64_t state = 0;
  const auto next = [&state] {  // of many magnitudes, so that the order of a sum shows in its last bits
    const uint64_t word = splitmix(++state);
    return std::ldexp(static_cast<float>(static_cast<int>(word % 255) - 127), static_cast<int>(word >> 60) - 14);
  };
  float* weight = arena.take<float>(kernels.panel * kInner);
  for (int i = 0; i < kernels.panel * kInner; i++) weight[i] = next();
  Rows given;
  given.count = kernels.panel;
  given.inner = kInner;
  given.weight = weight;
  linear.fill(0, given);
  Operand operand;
  operand.stride = static_cast<size_t>(kInner) * kernels.operand_bytes(dtype) + 64;
  operand.data = arena.take<char>(rows * operand.stride);
  operand.sums_stride = kInner / kGroup;
  operand.scale = arena.take<float>(rows * operand.sums_stride);
  operand.sums = arena.take<int32_t>(rows * operand.sums_stride);
  operand.offsets = arena.take<float>(rows * operand.sums_stride);
  float* scratch = arena.take<float>(2 * kInner);
  float* row = arena.take<float>(kInner);
  for (int m = 0; m < rows; m++) {
    for (int k = 0; k < kInner; k++) row[k] = next();
    kernels.prepare(dtype, row, nullptr, 0.0f, kInner, kInner, scratch, operand, m);
  }
  float* products = arena.take<float>(rows * kernels.panel);
  kernels.gemm(linear.weights(), operand, rows, 0, 1, products, kernels.panel);
  return products;
}

}  // namespace

bool same_products(const Kernels& left, const Kernels& right) {
  if (left.panel != right.panel) return false;
  Arena arena;
  for (const DType dtype : {DType::bf16, DType::i8, DType::i4, DType::q8_0, DType::q8_min})
    for (const int rows : kHeights) {
      const float *one = multiply(arena, left, dtype, rows), *other = multiply(arena, right, dtype, rows);
      if (std::memcmp(one, other, static_cast<size_t>(rows) * left.panel * sizeof(float)) != 0) return false;
    }
  return true;
}

}  // namespace outrider
