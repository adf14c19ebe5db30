// Attention of one row's queries over one key/value head, in blocks of absolute positions.
//
// Each query keeps a running maximum m, normaliser l and sums o (online softmax, Milakov and Gimelshein 2018,
// arXiv 1805.02867). Blocks and splits start at absolute multiples of kBlock and kSplit, and a fully masked block
// leaves the state of a query unchanged, so a query's result depends on its own visible positions only.
#pragma once

#include "gemm.hpp"
#include "rows.hpp"

namespace outrider::OUTRIDER_ISA {

constexpr int kWidestHead = 512 + kPanel;  // padded
constexpr float kInitialMax = -1e30f;  // before the first visible position; finite, so that differences are not NaN

static_assert(kBlock % kPanel == 0 && kSplit % kBlock == 0);

static inline size_t state_stride(int head_pad) { return head_pad + kStateTail; }

static void attention_begin(float* state, int count, int head_pad) {
  for (int i = 0; i < count; i++, state += state_stride(head_pad)) {
    std::memset(state, 0, head_pad * sizeof(float));
    state[head_pad] = kInitialMax;
    state[head_pad + 1] = 0.0f;
  }
}

static void attention_merge(float* into, const float* from, int count, int head_pad) {
  const size_t stride = state_stride(head_pad);
  for (int i = 0; i < count; i++, into += stride, from += stride) {
    const float a = into[head_pad], b = from[head_pad], m = a > b ? a : b;
    const F keep = exp(set(a - m)), add = exp(set(b - m));
    for (int d = 0; d < head_pad; d += kLanes) store(into + d, fma(load(from + d), add, load(into + d) * keep));
    into[head_pad] = m;
    into[head_pad + 1] = into[head_pad + 1] * first_of(keep) + from[head_pad + 1] * first_of(add);
  }
}

static void attention_finish(const float* state, int head_dim, int head_pad, float* out) {
  const float inverse = 1.0f / state[head_pad + 1];
  for (int d = 0; d < head_dim; d++) out[d] = state[d] * inverse;
}

// out[m][column] = M rows times one panel, or += with `add`: the product is summed from zero first, then added.
template <class Op, int M>
static inline void panel_product(const char* panel, const char* x, size_t x_stride, int steps, bool add, float* out,
                                 size_t out_stride) {
  F acc[M][kVectors];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kVectors; v++) acc[m][v] = F{};
  tile<Op, M>(panel, x, x_stride, steps, ahead_of(Op::kWidth, M), acc);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kVectors; v++) {
      float* to = out + m * out_stride + v * kLanes;
      store(to, add ? load(to) + acc[m][v] : acc[m][v]);
    }
}

template <class Op, bool int8>
struct BlockTile {
  const AttentionTask& task;
  const BlockLayout layout;
  const char *keys, *values;           // of the current block, as operands of the products
  const float *key_scale, *value_scale;  // int8: one per position
  float score[kTileRows][kBlock];
  alignas(64) char weight[kTileRows][kBlock * 4];  // the probabilities as operands
  alignas(64) uint16_t wide[int8 ? kBlock * 2 * kWidestHead : 1];  // int8 keys and values as bfloat16, which is exact

  explicit BlockTile(const AttentionTask& of)
      : task(of), layout(int8 ? DType::i8 : Op::kInner == 1 ? DType::f32 : DType::bf16, of.head_dim, of.head_pad) {}

  // Find the block that begins at position `start`.
  inline void open(int64_t start) {
    const char* block = task.pages + static_cast<size_t>(task.table[start / kBlock]) * task.page_bytes;
    keys = block;
    values = block + layout.values;
    if constexpr (int8) {
      key_scale = reinterpret_cast<const float*>(block + layout.scales);
      value_scale = key_scale + kBlock;
      const int8_t* from = reinterpret_cast<const int8_t*>(block);
      for (size_t i = 0; i < layout.scales; i++) {
        const float value = from[i];
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        wide[i] = static_cast<uint16_t>(bits >> 16);
      }
      keys = reinterpret_cast<const char*>(wide);
      values = reinterpret_cast<const char*>(wide + layout.values);
    }
  }

  // Softmax of one query's scores in this block; visible are [low, high) of its kBlock positions.
  inline void softmax(int row, int64_t low, int64_t high, float* state) {
    float* s = score[row];
    const int head_pad = task.head_pad;
    for (int64_t i = 0; i < low && i < kBlock; i++) s[i] = -INFINITY;
    for (int64_t i = high > 0 ? high : 0; i < kBlock; i++) s[i] = -INFINITY;
    F most = load(s);
    for (int i = kLanes; i < kBlock; i += kLanes) most = max(most, load(s + i));
    const float before = state[head_pad], now = reduce_max(most), m = now > before ? now : before;
    F sum = set(0.0f);
    for (int i = 0; i < kBlock; i += kLanes) {
      const F p = exp(load(s + i) - set(m));
      store(s + i, p);
      sum = sum + p;
    }
    const float total = reduce_add(sum);
    if (m == before) {
      state[head_pad + 1] += total;
      return;
    }
    const F keep = exp(set(before - m));
    for (int d = 0; d < head_pad; d += kLanes) store(state + d, load(state + d) * keep);
    state[head_pad] = m;
    state[head_pad + 1] = first_of(set(state[head_pad + 1]) * keep) + total;
  }

  template <int M>
  inline void block(int first, int64_t start) {
    const int head_pad = task.head_pad;
    const size_t stride = state_stride(head_pad);
    const char* x = task.queries + first * task.query_stride;
    constexpr int per_step = Op::kInner;
    const size_t element_block = static_cast<size_t>(task.head_dim) / per_step * Op::kBytes;
    const int64_t known = task.row_end - start < kBlock ? task.row_end - start : kBlock;
    for (int p = 0; p * kPanel < known; p++)  // the softmax masks the others
      panel_product<Op, M>(keys + p * element_block, x, task.query_stride, task.head_dim / per_step, false,
                           &score[0][p * kPanel], kBlock);
    for (int m = 0; m < M; m++) {
      if constexpr (int8)
        for (int i = 0; i < kBlock; i += kLanes) store(score[m] + i, load(score[m] + i) * load(key_scale + i));
      const int64_t position = task.first_position + (first + m) / task.group;
      int64_t low = task.window && position + 1 > task.window ? position + 1 - task.window : 0;
      const int64_t high = task.causal ? position + 1 : task.row_end;
      softmax(m, low - start, high - start, task.state + (first + m) * stride);
      if constexpr (int8)
        for (int i = 0; i < kBlock; i += kLanes) store(score[m] + i, load(score[m] + i) * load(value_scale + i));
      if constexpr (Op::kInner == 1)
        std::memcpy(weight[m], score[m], sizeof score[m]);
      else
        convert_bf16(score[m], kBlock, weight[m]);
    }
    const int steps = static_cast<int>((known + per_step - 1) / per_step);
    const size_t panel = static_cast<size_t>(kBlock) / per_step * Op::kBytes;
    for (int p = 0; p * kPanel < head_pad; p++)
      panel_product<Op, M>(values + p * panel, weight[0], sizeof weight[0], steps, true,
                           task.state + first * stride + p * kPanel, stride);
  }

  template <int M = kTileRows>
  inline void dispatch(int rows, int first, int64_t start) {
    if (rows == M) return block<M>(first, start);
    if constexpr (M > 1) dispatch<M - 1>(rows, first, start);
  }
};

template <class Op, bool int8 = false>
static void attend_as(const AttentionTask& task) {
  BlockTile<Op, int8> tile(task);
  const int tiles = (task.count + kTileRows - 1) / kTileRows, height = (task.count + tiles - 1) / tiles;
  for (int64_t start = task.begin; start < task.end; start += kBlock) {
    tile.open(start);
    for (int first = 0; first < task.count; first += height) {
      const int rows = task.count - first < height ? task.count - first : height;
      const int64_t earliest = task.first_position + first / task.group;
      const int64_t latest = task.first_position + (first + rows - 1) / task.group;
      if (task.causal && start > latest) continue;
      if (task.window && start + kBlock <= earliest + 1 - task.window) continue;
      tile.dispatch(rows, first, start);
    }
  }
}

static void attend(DType dtype, const AttentionTask& task) {
  if (task.count == 0) return;
  if (dtype == DType::f32)
    attend_as<OpF32>(task);
  else if (dtype == DType::i8)
    attend_as<OpBF16, true>(task);
  else
    attend_as<OpBF16>(task);
}

// Element (k, column) of a panel whose steps hold `per_step` k side by side.
template <class T>
static inline void put(char* base, int64_t k, int column, int per_step, T value) {
  const int64_t index = (k / per_step * kPanel + column) * per_step + k % per_step;
  std::memcpy(base + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

// Symmetric 8-bit quantisation of one key or value head; returns the scale, NaN for a head that is not finite.
static inline float quantise_head(const float* x, int n, int8_t* out) {
  float largest = 1e-10f, broken = 0.0f;
  for (int i = 0; i < n; i++) {
    largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    broken += x[i] - x[i];
  }
  if (broken != 0.0f) {
    std::memset(out, 0, n);
    return kNaN;
  }
  const float inverse = 127.0f / largest;
  for (int i = 0; i < n; i++) out[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
  return largest / 127.0f;
}

static void store_key(DType dtype, const float* key, int head_dim, int head_pad, int position, char* block) {
  const int column = position % kPanel, panel = position / kPanel * head_dim * kPanel;
  int8_t quantised[kWidestHead];
  if (dtype == DType::i8) {
    const float scale = quantise_head(key, head_dim, quantised);
    const BlockLayout layout(dtype, head_dim, head_pad);
    std::memcpy(block + layout.scales + position * sizeof(float), &scale, sizeof scale);
  }
  for (int d = 0; d < head_dim; d++) {
    if (dtype == DType::f32)
      put<float>(block + panel * 4, d, column, 1, key[d]);
    else if (dtype == DType::i8)
      put<int8_t>(block + panel, d, column, 2, quantised[d]);
    else
      put<uint16_t>(block + panel * 2, d, column, 2, to_bf16(key[d]));
  }
}

static void store_value(DType dtype, const float* value, int head_dim, int head_pad, int position, char* block) {
  const BlockLayout layout(dtype, head_dim, head_pad);
  char* const values = block + layout.values;
  int8_t quantised[kWidestHead];
  if (dtype == DType::i8) {
    const float scale = quantise_head(value, head_pad, quantised);
    std::memcpy(block + layout.scales + (kBlock + position) * sizeof(float), &scale, sizeof scale);
    // The next position's scale is multiplied by probability 0 until it is stored: it must be finite.
    if (position % 2 == 0) std::memset(block + layout.scales + (kBlock + position + 1) * sizeof(float), 0, 4);
  }
  for (int d = 0; d < head_pad; d++) {
    const int panel = d / kPanel * kBlock * kPanel;
    if (dtype == DType::f32) {
      put<float>(values + panel * 4, position, d % kPanel, 1, value[d]);
    } else if (dtype == DType::i8) {
      put<int8_t>(values + panel, position, d % kPanel, 2, quantised[d]);
    } else {
      put<uint16_t>(values + panel * 2, position, d % kPanel, 2, to_bf16(value[d]));
      // The next position shares this pair and is multiplied by probability 0 until it is stored: it must be finite.
      if (position % 2 == 0) put<uint16_t>(values + panel * 2, position + 1, d % kPanel, 2, 0);
    }
  }
}

}  // namespace outrider::OUTRIDER_ISA
