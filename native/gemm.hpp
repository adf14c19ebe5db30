// y = x W^T for a few rows: each panel byte is read once, whatever the number of rows.
//
// A sum over K is split into fixed chunks: each chunk is summed in registers from zero, in k order, and the chunks are
// added in order. Tiles only group the rows that are multiplied with a chunk while it is in the L1 cache; they do not
// change any sum.
#pragma once

#include "ops.hpp"

namespace outrider::OUTRIDER_ISA {

constexpr int kChunkSteps = 128;                        // of 4 * P bytes: 16 KiB with 32 columns
constexpr int kChunkGroups = 1024 / kGroup;             // int4: 1,024 k

// Sums all chunks into total[m][v]. `Tile` multiplies one chunk with up to kRows rows.
template <class Tile>
static inline void chunked(const char* w, size_t step_bytes, const Operand& x, size_t x_step_bytes, int row, int rows,
                           int steps, int chunk, typename Tile::Acc (*total)[kVectors]) {
  const int tiles = (rows + Tile::kRows - 1) / Tile::kRows, height = (rows + tiles - 1) / tiles;
  for (int s = 0; s < steps; s += chunk) {
    const int n = steps - s < chunk ? steps - s : chunk;
    for (int m = 0; m < rows; m += height)
      Tile::run(rows - m < height ? rows - m : height, w + s * step_bytes, x, row + m, s * x_step_bytes, s, n, s == 0,
                total + m);
  }
}

template <class Op>
struct StepTile {
  using Acc = typename Op::Acc;
  static constexpr int kRows = kTileRows;
  template <int M>
  static inline void fixed(const char* w, const Operand& x, int row, size_t offset, int, int steps, bool first,
                           Acc (*total)[kVectors]) {
    Acc acc[M][kVectors];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) acc[m][v] = Acc{};
    tile<Op, M>(w, x.data + row * x.stride + offset, x.stride, steps, acc);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) total[m][v] = first ? acc[m][v] : total[m][v] + acc[m][v];
  }
  static inline void run(int rows, const char* w, const Operand& x, int row, size_t offset, int step, int steps,
                         bool first, Acc (*total)[kVectors]);
};

struct GroupTile {
  using Acc = F;
  static constexpr int kRows = kTileRows;
  template <int M>
  static inline void fixed(const char* w, const Operand& x, int row, size_t offset, int group, int groups, bool first,
                           F (*total)[kVectors]) {
    F sum[M][kVectors];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) sum[m][v] = F{};
    const char* rows = x.data + row * x.stride + offset;
    const int32_t* start = x.sums + static_cast<ptrdiff_t>(row) * x.sums_stride + group;
    for (int g = 0; g < groups; g++, w += kGroupBytes, rows += kGroup) {
      prefetch_ahead<2 * M>(w, kGroupBytes);  // a byte is two weights
      I acc[M][kVectors];
      for (int m = 0; m < M; m++)
        for (int v = 0; v < kVectors; v++) acc[m][v] = set_int(start[static_cast<ptrdiff_t>(m) * x.sums_stride + g]);
      group_product<M>(w + kPanel * 2, rows, x.stride, acc);
      F scale[kVectors];
      group_scales(w, scale);
      for (int m = 0; m < M; m++)
        for (int v = 0; v < kVectors; v++) sum[m][v] = fma(to_float(acc[m][v]), scale[v], sum[m][v]);
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) total[m][v] = first ? sum[m][v] : total[m][v] + sum[m][v];
  }
  static inline void run(int rows, const char* w, const Operand& x, int row, size_t offset, int group, int groups,
                         bool first, F (*total)[kVectors]);
};

// Register tiles have a compile-time number of rows: one instance for every number up to kTileRows.
template <class Tile, int M = Tile::kRows>
static inline void dispatch(int rows, const char* w, const Operand& x, int row, size_t offset, int step, int steps,
                            bool first, typename Tile::Acc (*total)[kVectors]) {
  if (rows == M) return Tile::template fixed<M>(w, x, row, offset, step, steps, first, total);
  if constexpr (M > 1) dispatch<Tile, M - 1>(rows, w, x, row, offset, step, steps, first, total);
}
template <class Op>
inline void StepTile<Op>::run(int rows, const char* w, const Operand& x, int row, size_t offset, int step, int steps,
                              bool first, Acc (*total)[kVectors]) {
  dispatch<StepTile<Op>>(rows, w, x, row, offset, step, steps, first, total);
}
inline void GroupTile::run(int rows, const char* w, const Operand& x, int row, size_t offset, int group, int groups,
                           bool first, F (*total)[kVectors]) {
  dispatch<GroupTile>(rows, w, x, row, offset, group, groups, first, total);
}

// Converts one row's accumulators to float32 outputs.
static inline F finish(const Weights&, const Operand&, int, int, F sum) { return sum; }
static inline F finish(const Weights& w, const Operand& x, int row, int column, I sum) {
  const F exact = to_float(sum + x.sums[static_cast<ptrdiff_t>(row) * x.sums_stride]);
  return exact * load(w.scale + column) * set(x.scale[row]);
}

template <class Tile>
static void gemm_panels(const Weights& w, const Operand& x, int rows, int first, int last, size_t step_bytes,
                        size_t x_step_bytes, int steps, int chunk, float* y, size_t y_stride) {
  using Acc = typename Tile::Acc;
  alignas(64) Acc total[kRowBlock][kVectors];
  for (int p = first; p < last; p++) {
    const char* panel = w.data + p * w.panel_bytes;
    for (int row = 0; row < rows; row += kRowBlock) {
      const int count = rows - row < kRowBlock ? rows - row : kRowBlock;
      chunked<Tile>(panel, step_bytes, x, x_step_bytes, row, count, steps, chunk, total);
      for (int m = 0; m < count; m++)
        for (int v = 0; v < kVectors; v++) {
          const int column = p * kPanel + v * kLanes;
          F value = finish(w, x, row + m, column, total[m][v]);
          if (w.dtype == DType::i4) value = value * set(x.scale[row + m]);
          if (w.bias) value = value + load(w.bias + column);
          store(y + (row + m) * y_stride + (p - first) * kPanel + v * kLanes, value);
        }
    }
  }
}

static void gemm(const Weights& w, const Operand& x, int rows, int first, int last, float* y, size_t y_stride) {
  const int steps = w.inner / k_per_step(w.dtype);
  switch (w.dtype) {
    case DType::f32:
      return gemm_panels<StepTile<OpF32>>(w, x, rows, first, last, OpF32::kBytes, OpF32::kOperandBytes, steps,
                                          kChunkSteps, y, y_stride);
    case DType::bf16:
      return gemm_panels<StepTile<OpBF16>>(w, x, rows, first, last, OpBF16::kBytes, OpBF16::kOperandBytes, steps,
                                           kChunkSteps, y, y_stride);
    case DType::i8:
      return gemm_panels<StepTile<OpI8>>(w, x, rows, first, last, OpI8::kBytes, OpI8::kOperandBytes, steps, kChunkSteps,
                                         y, y_stride);
    case DType::i4:
      return gemm_panels<GroupTile>(w, x, rows, first, last, kGroupBytes, kGroup, w.inner / kGroup, kChunkGroups, y,
                                    y_stride);
  }
}

}  // namespace outrider::OUTRIDER_ISA
