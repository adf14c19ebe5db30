// y = x W^T for a few rows: each panel byte is read once, whatever the number of rows.
//
// A sum over K is split into fixed chunks: each chunk is summed in registers from zero, in k order, and the chunks are
// added in order. Tiles only group the rows that are multiplied with a chunk while it is in the L1 cache; they do not
// change any sum.
#pragma once

#include "ops.hpp"
#if defined(OUTRIDER_TILES)
#include "tile_gemm.hpp"
#endif

namespace outrider::OUTRIDER_ISA {

constexpr int kChunkSteps = 128;                        // of 4 * P bytes: 16 KiB with 32 columns
constexpr int kNibbleChunk = 1024 / kGroup;             // groups: as many bytes
constexpr int kByteChunk = 512 / kGroup;

// Sums all chunks into total[m][v]. `Tile` multiplies one chunk with up to kRows rows.
template <class Tile>
static inline void chunked(const char* w, size_t step_bytes, const Operand& x, size_t x_step_bytes, int row, int rows,
                           int steps, int chunk, typename Tile::Acc (*total)[kVectors]) {
  const int tiles = (rows + Tile::kRows - 1) / Tile::kRows, height = (rows + tiles - 1) / tiles;
  const int ahead = ahead_of(Tile::kWidth, rows);
  for (int s = 0; s < steps; s += chunk) {
    const int n = steps - s < chunk ? steps - s : chunk;
    for (int m = 0; m < rows; m += height)
      Tile::run(rows - m < height ? rows - m : height, w + s * step_bytes, x, row + m, s * x_step_bytes, s, n, s == 0,
                ahead, total + m);
  }
}

template <class Op>
struct StepTile {
  using Acc = typename Op::Acc;
  static constexpr int kRows = kTileRows;
  static constexpr Width kWidth = Op::kWidth;
  template <int M>
  static inline void fixed(const char* w, const Operand& x, int row, size_t offset, int, int steps, bool first, int ahead,
                           Acc (*total)[kVectors]) {
    Acc acc[M][kVectors];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) acc[m][v] = Acc{};
    tile<Op, M>(w, x.data + row * x.stride + offset, x.stride, steps, ahead, acc);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) total[m][v] = first ? acc[m][v] : total[m][v] + acc[m][v];
  }
  static inline void run(int rows, const char* w, const Operand& x, int row, size_t offset, int step, int steps,
                         bool first, int ahead, Acc (*total)[kVectors]);
};

// Groups of kGroup k: an exact integer product of each, scaled and added to a float32 sum, group after group. Block
// formats scale by the weights' and by the activations' scale of the group, and add minimum * (sum of the activations).
template <class Format>
struct GroupTile {
  using Acc = F;
  // Groups need more registers for each row. On Zen 4, 8 rows at a time were 10 to 20 % faster in a prefill than 14.
  static constexpr int kRows = kTileRows / 2 + 1;
  static constexpr Width kWidth = GroupSizes<Format>::kWidth;
  template <int M>
  static inline void fixed(const char* w, const Operand& x, int row, size_t offset, int group, int groups, bool first,
                           int ahead, F (*total)[kVectors]) {
    using Sizes = GroupSizes<Format>;
    F sum[M][kVectors];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) sum[m][v] = F{};
    const char* rows = x.data + row * x.stride + offset;
    const ptrdiff_t stride = x.sums_stride;
    const int32_t* start = x.sums + row * stride + group;
    const float* row_scale = x.scale + row * stride + group;
    const float* row_offset = x.offsets + row * stride + group;
    for (int g = 0; g < groups; g++, w += Sizes::kBytes, rows += Sizes::kOperandBytes) {
      I acc[M][kVectors];
      for (int m = 0; m < M; m++)
        for (int v = 0; v < kVectors; v++) acc[m][v] = Format::kStart ? set_int(start[m * stride + g]) : I{};
      if constexpr (Format::kNibbles)
        group_product<Format, M>(w, rows, x.stride, ahead, acc);
      else
        byte_product<Format, M>(w, rows, x.stride, ahead, acc);
      if constexpr (!Format::kBlocks) {
        F scale[kVectors];
        group_scales(w, scale);
        for (int m = 0; m < M; m++)
          for (int v = 0; v < kVectors; v++) sum[m][v] = fma(to_float(acc[m][v]), scale[v], sum[m][v]);
        continue;
      }
      for (int v = 0; v < kVectors; v++) {
        const F scale = load_half(w + v * kLanes * 2);
        for (int m = 0; m < M; m++)
          sum[m][v] = fma(to_float(acc[m][v]), scale * set(row_scale[m * stride + g]), sum[m][v]);
      }
      if constexpr (Format::kMinimum)
        for (int v = 0; v < kVectors; v++) {
          const F minimum = load_half(w + (kVectors + v) * kLanes * 2);
          for (int m = 0; m < M; m++) sum[m][v] = fma(minimum, set(row_offset[m * stride + g]), sum[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) total[m][v] = first ? sum[m][v] : total[m][v] + sum[m][v];
  }
  static inline void run(int rows, const char* w, const Operand& x, int row, size_t offset, int group, int groups,
                         bool first, int ahead, F (*total)[kVectors]);
};

// Register tiles have a compile-time number of rows: one instance for every number up to kTileRows.
template <class Tile, int M = Tile::kRows>
static inline void dispatch(int rows, const char* w, const Operand& x, int row, size_t offset, int step, int steps,
                            bool first, int ahead, typename Tile::Acc (*total)[kVectors]) {
  if (rows == M) return Tile::template fixed<M>(w, x, row, offset, step, steps, first, ahead, total);
  if constexpr (M > 1) dispatch<Tile, M - 1>(rows, w, x, row, offset, step, steps, first, ahead, total);
}
template <class Op>
inline void StepTile<Op>::run(int rows, const char* w, const Operand& x, int row, size_t offset, int step, int steps,
                              bool first, int ahead, Acc (*total)[kVectors]) {
  dispatch<StepTile<Op>>(rows, w, x, row, offset, step, steps, first, ahead, total);
}
template <class Format>
inline void GroupTile<Format>::run(int rows, const char* w, const Operand& x, int row, size_t offset, int group,
                                   int groups, bool first, int ahead, F (*total)[kVectors]) {
  dispatch<GroupTile<Format>>(rows, w, x, row, offset, group, groups, first, ahead, total);
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

template <class Format>
static void gemm_groups(const Weights& w, const Operand& x, int rows, int first, int last, float* y, size_t y_stride) {
  using Sizes = GroupSizes<Format>;
  const int groups = w.inner / kGroup, chunk = Format::kNibbles ? kNibbleChunk : kByteChunk;
#if defined(OUTRIDER_TILES)
  if (on_tiles(tile_use_of(w.dtype), rows))
    return gemm_panels<MatrixGroupTile<Format>>(w, x, rows, first, last, Sizes::kBytes, Sizes::kOperandBytes, groups,
                                                chunk, y, y_stride);
#endif
  gemm_panels<GroupTile<Format>>(w, x, rows, first, last, Sizes::kBytes, Sizes::kOperandBytes, groups, chunk, y,
                                 y_stride);
}

// Formats of one number, or two or four side by side, a lane. bfloat16 is summed in the tiles' order at one row too.
template <class Op>
static void gemm_steps(const Weights& w, const Operand& x, int rows, int first, int last, float* y, size_t y_stride) {
  const int steps = w.inner / Op::kInner;
#if defined(OUTRIDER_TILES)
  if constexpr (Op::kInner > 1)
    if (std::is_same_v<Op, OpBF16> || on_tiles(tile_use_of(w.dtype), rows))
      return gemm_panels<MatrixTile<Op>>(w, x, rows, first, last, Op::kBytes, Op::kOperandBytes, steps, steps, y,
                                         y_stride);
#endif
  gemm_panels<StepTile<Op>>(w, x, rows, first, last, Op::kBytes, Op::kOperandBytes, steps, kChunkSteps, y, y_stride);
}

// K of a matrix is padded to a multiple of this.
static int inner_unit(DType dtype) {
  if (has_groups(dtype)) return kGroup;
#if defined(OUTRIDER_TILES)
  return dtype == DType::f32 ? 1 : 16 * k_per_step(dtype);
#else
  return k_per_step(dtype);
#endif
}

static void gemm(const Weights& w, const Operand& x, int rows, int first, int last, float* y, size_t y_stride) {
  switch (w.dtype) {
    case DType::f32: return gemm_steps<OpF32>(w, x, rows, first, last, y, y_stride);
    case DType::bf16: return gemm_steps<OpBF16>(w, x, rows, first, last, y, y_stride);
    case DType::i8: return gemm_steps<OpI8>(w, x, rows, first, last, y, y_stride);
    case DType::i4: return gemm_groups<GroupI4>(w, x, rows, first, last, y, y_stride);
    case DType::q8_0: return gemm_groups<GroupQ80>(w, x, rows, first, last, y, y_stride);
    case DType::q4_0: return gemm_groups<GroupQ40>(w, x, rows, first, last, y, y_stride);
    case DType::q4_1: return gemm_groups<GroupQ41>(w, x, rows, first, last, y, y_stride);
    case DType::q8_min: return gemm_groups<GroupQ8Min>(w, x, rows, first, last, y, y_stride);
  }
}

}  // namespace outrider::OUTRIDER_ISA
