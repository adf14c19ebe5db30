// Products on matrix tiles: up to 32 rows of activations against one panel, each weight read once.
//
// A panel is read as it is stored: 16 steps of it are two tiles, one for each half of its columns. Two tiles of rows
// and two of weights make four products. All of K is summed in the tiles' accumulators, in one order for any number of
// rows; groups are summed one by one, then scaled and added as `GroupTile` does it, so their bits are those of AVX-512.
#pragma once

#include "ops.hpp"
#include "tiles.hpp"

namespace outrider::OUTRIDER_ISA {

static_assert(kVectors == 2 && kLanes == 16);

static TileRows tile_rows = {{1}, {5}, {5}};
static inline bool on_tiles(TileUse use, int rows) {
  return rows >= tile_rows[static_cast<int>(use)].load(std::memory_order_relaxed);
}

constexpr int kTileHeight = 16;              // rows of one tile
constexpr int kBothHeights = 2 * kTileHeight;
constexpr size_t kStepBytes = kPanel * 4;    // of a panel: two rows of weight tiles, side by side

// Tiles 0 to 3 are accumulators: [rows of activations / 16][half of the columns]; 4 and 5 hold activations, 6 and 7
// weights.
static inline tiles::Config shapes_of(int rows, int steps) {
  const int first = rows < kTileHeight ? rows : kTileHeight, second = rows - first;
  tiles::Config config;
  const auto set = [&config](int t, int height, int bytes) {
    config.rows[t] = static_cast<uint8_t>(height);
    config.bytes[t] = static_cast<uint16_t>(height ? bytes : 0);
  };
  for (int v = 0; v < kVectors; v++) {
    set(v, first, 64);
    set(2 + v, second, 64);
    set(6 + v, steps, 64);
  }
  set(4, first, 4 * steps);
  set(5, second, 4 * steps);
  return config;
}

// The tiles' shapes are in force during a product, and the registers are given back at its end: a thread that holds
// tiles is slower to switch.
class Shapes {
 public:
  Shapes(int rows, int steps) : two_(rows > kTileHeight) { tiles::configure(shapes_of(rows, steps)); }
  ~Shapes() { tiles::release(); }
  Shapes(const Shapes&) = delete;
  bool two() const { return two_; }

 private:
  bool two_;
};

static inline void zero_sums(bool two) {
  tiles::zero<0>();
  tiles::zero<1>();
  if (!two) return;
  tiles::zero<2>();
  tiles::zero<3>();
}

// One step of all tiles: rows at `x`, and weights at `w` with kStepBytes from row to row.
template <bool bytes>
static inline void multiply_tiles(const char* w, const char* x, size_t x_stride, bool two) {
  const auto multiply = []<int c, int a, int b>() {
    if constexpr (bytes)
      tiles::multiply_bytes<c, a, b>();
    else
      tiles::multiply_bf16<c, a, b>();
  };
  tiles::load<6>(w, kStepBytes);
  tiles::load<4>(x, x_stride);
  multiply.template operator()<0, 4, 6>();
  tiles::load<7>(w + 64, kStepBytes);
  multiply.template operator()<1, 4, 7>();
  if (!two) return;
  tiles::load<5>(x + kTileHeight * x_stride, x_stride);
  multiply.template operator()<2, 5, 6>();
  multiply.template operator()<3, 5, 7>();
}

static inline void store_sums(char* to, bool two) {
  tiles::store<0>(to, kStepBytes);
  tiles::store<1>(to + 64, kStepBytes);
  if (!two) return;
  tiles::store<2>(to + kTileHeight * kStepBytes, kStepBytes);
  tiles::store<3>(to + kTileHeight * kStepBytes + 64, kStepBytes);
}

// int8 and bfloat16: K is padded to whole tiles of 16 steps, and `chunked` has one chunk.
template <class Op>
struct MatrixTile {
  using Acc = typename Op::Acc;
  static constexpr int kRows = kBothHeights, kSteps = 16;
  static constexpr Width kWidth = Op::kWidth;
  static_assert(Op::kBytes == kStepBytes && Op::kOperandBytes == 4 && sizeof(Acc[kVectors]) == kStepBytes);

  static inline void run(int rows, const char* w, const Operand& x, int row, size_t offset, int, int steps, bool,
                         int ahead, Acc (*total)[kVectors]) {
    const Shapes shapes(rows, kSteps);
    zero_sums(shapes.two());
    const char* from = x.data + row * x.stride + offset;
    for (int s = 0; s < steps; s += kSteps, w += kSteps * kStepBytes, from += kSteps * Op::kOperandBytes) {
      prefetch_share<kSteps * kStepBytes, 1>(w, 0, ahead);
      multiply_tiles<Op::kWidth == Width::byte>(w, from, x.stride, shapes.two());
    }
    store_sums(reinterpret_cast<char*>(total), shapes.two());
  }
};

// Groups: half a tile of K each. Nibbles become bytes in a buffer that stays in L1, once for all rows.
template <class Format>
struct MatrixGroupTile {
  using Acc = F;
  static constexpr int kRows = kBothHeights;
  static constexpr Width kWidth = GroupSizes<Format>::kWidth;

  static inline const char* unpacked(const char* values, char* buffer) {
    if constexpr (!Format::kNibbles) return values;
    for (int s = 0; s < kGroupSteps; s++) {
      const I both = load_int(values + s * kNibbleBytes);
      store_int(buffer + s * kStepBytes, both & 0x0f0f0f0f);
      store_int(buffer + s * kStepBytes + 64, shift_right<4>(both) & 0x0f0f0f0f);
    }
    return buffer;
  }

  static inline void run(int rows, const char* w, const Operand& x, int row, size_t offset, int group, int groups,
                         bool first, int ahead, F (*total)[kVectors]) {
    using Sizes = GroupSizes<Format>;
    static_assert(Sizes::kOperandBytes == kGroup);
    alignas(64) char buffer[kGroupSteps * kStepBytes];
    alignas(64) I product[kBothHeights][kVectors];
    F sum[kBothHeights][kVectors];
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < kVectors; v++) sum[m][v] = F{};
    const Shapes shapes(rows, kGroupSteps);
    const char* from = x.data + row * x.stride + offset;
    const ptrdiff_t stride = x.sums_stride, at = row * stride + group;
    for (int g = 0; g < groups; g++, w += Sizes::kBytes, from += Sizes::kOperandBytes) {
      prefetch_share<Sizes::kBytes, 1>(w, 0, ahead);
      zero_sums(shapes.two());
      multiply_tiles<true>(unpacked(w + Sizes::kHeader, buffer), from, x.stride, shapes.two());
      store_sums(reinterpret_cast<char*>(product), shapes.two());
      F scale[kVectors], minimum[kVectors];
      if constexpr (!Format::kBlocks) group_scales(w, scale);
      for (int v = 0; v < kVectors; v++) {
        if constexpr (Format::kBlocks) scale[v] = load_half(w + v * kLanes * 2);
        if constexpr (Format::kMinimum) minimum[v] = load_half(w + (kVectors + v) * kLanes * 2);
      }
      for (int m = 0; m < rows; m++) {
        const ptrdiff_t i = at + m * stride + g;
        for (int v = 0; v < kVectors; v++) {
          const I exact = Format::kStart ? product[m][v] + set_int(x.sums[i]) : product[m][v];
          const F factor = Format::kBlocks ? scale[v] * set(x.scale[i]) : scale[v];
          sum[m][v] = fma(to_float(exact), factor, sum[m][v]);
          if constexpr (Format::kMinimum) sum[m][v] = fma(minimum[v], set(x.offsets[i]), sum[m][v]);
        }
      }
    }
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < kVectors; v++) total[m][v] = first ? sum[m][v] : total[m][v] + sum[m][v];
  }
};

}  // namespace outrider::OUTRIDER_ISA
