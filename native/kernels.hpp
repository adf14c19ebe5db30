// The table of kernels that every instruction set provides; each build of kernels.cpp fills one.
//
// Legend: M rows of activations, K inner width, N outputs, P columns of a weight panel (Kernels::panel).
// Every function treats rows independently and sums each of them in one fixed order, so a row's result does not depend
// on the number of rows, nor on the thread that computes it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace outrider {

// q8_0, q4_0 and q4_1 are the block formats of GGUF files: blocks of 32 inner elements with an fp16 scale, q4_1 with an
// fp16 minimum too. q8_min is q8_0 with a minimum; it holds the values of all three, for matrices that are packed
// together but come in different formats.
enum class DType : int { f32 = 0, bf16 = 1, i8 = 2, i4 = 3, q8_0 = 4, q4_0 = 5, q4_1 = 6, q8_min = 7 };

// Functions of this header that kernels.cpp calls are static: it is compiled once per instruction set, and the linker
// must not merge the copies.

// Inner elements that share one 4-byte lane of a panel: the K step of the kernels.
static constexpr int k_per_step(DType dtype) { return dtype == DType::f32 ? 1 : dtype == DType::bf16 ? 2 : 4; }
static constexpr bool is_blocks(DType dtype) { return dtype >= DType::q8_0; }
static constexpr bool has_groups(DType dtype) { return dtype == DType::i4 || is_blocks(dtype); }
static constexpr bool has_minimum(DType dtype) { return dtype == DType::q4_1 || dtype == DType::q8_min; }
static constexpr bool is_nibbles(DType dtype) {
  return dtype == DType::i4 || dtype == DType::q4_0 || dtype == DType::q4_1;
}
// What is added to a weight's integer where it is stored: kInt8Zero for signed bytes, kInt4Zero for signed nibbles.
static constexpr int zero_of(DType dtype) { return dtype == DType::q4_1 ? 0 : is_nibbles(dtype) ? 8 : 128; }

// How many bits a weight has decides whether reading it or multiplying it takes longer.
enum class Width : int { float32 = 0, bfloat16 = 1, byte = 2, nibble = 3 };
constexpr int kWidths = 4;
static constexpr Width width_of(DType dtype) {
  if (dtype == DType::f32) return Width::float32;
  if (dtype == DType::bf16) return Width::bfloat16;
  return is_nibbles(dtype) ? Width::nibble : Width::byte;
}

constexpr int kGroup = 32;       // inner elements that share a scale: int4 and the block formats
constexpr int kBlock = 64;       // positions of one softmax step; blocks start at absolute multiples of it
constexpr int kSplit = 512;      // positions whose partial softmax is merged in order; a multiple of kBlock
constexpr int kWidestUnit = 64;  // of all inner_unit
constexpr int kRowBlock = 256;   // rows one panel is multiplied with before the next row block
constexpr int kWidestRow = 4096; // of a RowMajor matrix
constexpr int kInt8Zero = 128;   // weights are stored unsigned: q + zero
constexpr int kInt4Zero = 8;

static constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A [N, K] matrix as panels of P output columns, read front to back exactly once per pass.
struct Weights {
  DType dtype = DType::f32;
  int inner = 0;                // K, padded to whole steps (whole groups where the format has them)
  int panels = 0;               // ceil(N / P)
  size_t panel_bytes = 0;
  const char* data = nullptr;
  const float* scale = nullptr; // int8: one per column
  const float* bias = nullptr;  // one per column, or null
};

// Rows of activations in the form that `gemm` multiplies: converted, or quantised per row.
struct Operand {
  char* data = nullptr;
  size_t stride = 0;            // bytes between rows
  float* scale = nullptr;       // int8, int4: one per row; block formats: one per group of a row
  int32_t* sums = nullptr;      // -zero * sum of the quantised row (int8) or of each of its groups
  float* offsets = nullptr;     // block formats with a minimum: scale * sum of each group
  int sums_stride = 0;          // groups per row, of all three where they are per group
};

// A matrix whose rows are read one by one: float32 or bfloat16, K padded to whole panels (see pack_row).
struct RowMajor {
  DType dtype = DType::f32;
  int inner = 0;
  size_t row_bytes = 0;
  const char* data = nullptr;
};

// What one key/value head keeps of kBlock positions: keys [kBlock / P][head_dim][P], then values [head_pad / P][kBlock][P],
// both in the order of weight panels; int8 ones are followed by a float scale per position, the keys' first.
struct BlockLayout {
  size_t values, scales, bytes;  // where values and scales begin, and the size of it all
  BlockLayout(DType dtype, int head_dim, int head_pad) {
    const size_t element = dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2;
    values = element * kBlock * head_dim;
    scales = values + element * kBlock * head_pad;
    bytes = scales + (dtype == DType::i8 ? 2 * kBlock * sizeof(float) : 0);
  }
};

// The queries of one row of the batch that share a key/value head, against cached positions [begin, end).
struct AttentionTask {
  const char* queries;          // operand rows; query i is head i % group of token i / group
  size_t query_stride;
  int count;
  int group;
  int64_t first_position;       // of query 0's token
  int64_t row_end;              // one past the row's last new token
  bool causal;                  // false: every query sees everything before row_end
  int64_t window;               // 0: unlimited
  const char* pages;            // of this layer and head: its part of page 0 (see BlockLayout)
  size_t page_bytes;
  const int32_t* table;         // the page of each block of kBlock positions
  int head_dim, head_pad;
  int64_t begin, end;           // begin is a multiple of kBlock
  float* state;                 // per query: head_pad sums, then the maximum and the normaliser
};

// Software prefetch of weights: what is best depends on the machine and is measured (backends/tuning.py). No result
// depends on it. One for each table of kernels.
struct ReadAhead {
  std::atomic<int> bytes;          // from what is multiplied to what is prefetched
  std::atomic<int> rows[kWidths];  // of a product, from which on it prefetches
};

// From how many rows on matrix tiles compute a product, where its bits are those of vectors: bytes with a scale per
// column, groups of bytes, groups of nibbles. Few rows may be faster without; that is measured too.
enum class TileUse : int { bytes = 0, byte_groups = 1, nibble_groups = 2 };
constexpr int kTileUses = 3;
using TileRows = std::atomic<int>[kTileUses];
static constexpr TileUse tile_use_of(DType dtype) {
  return is_nibbles(dtype) ? TileUse::nibble_groups : dtype == DType::i8 ? TileUse::bytes : TileUse::byte_groups;
}

constexpr int kStateTail = 16;  // floats after the sums of an attention state; keeps rows aligned

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2 };

struct Kernels {
  const char* name;
  int panel;                                // P
  int (*operand_bytes)(DType dtype);        // per inner element
  int (*inner_unit)(DType dtype);           // K of a matrix is padded to a multiple of this
  // y[m][(p - first) * P + c] for rows m of x and panels first <= p < last.
  void (*gemm)(const Weights& w, const Operand& x, int rows, int first, int last, float* y, size_t y_stride);
  // One row: optional RMS norm (gain may be null), then zeros up to `inner` and conversion into row `row` of `out`.
  void (*prepare)(DType dtype, const float* x, const float* gain, float eps, int width, int inner, float* scratch,
                  const Operand& out, int row);
  void (*rms_norm)(const float* x, const float* gain, float eps, int width, float* out);
  // x = (x + y) * scalar, with y normalised first where gain is given.
  void (*accumulate)(float* x, const float* y, const float* gain, float eps, float scalar, int width, float* scratch);
  void (*activate)(Activation kind, const float* gate, const float* up, int count, float* out);
  // One query or key head: optional norm, rotation by (cos, sin) of half the width, then * factor.
  void (*rotate)(const float* x, const float* gain, float eps, const float* cosine, const float* sine, float factor,
                 int head_dim, float* out);
  // Into a block (see BlockLayout), at a position within it.
  void (*store_key)(DType dtype, const float* key, int head_dim, int head_pad, int position, char* block);
  void (*store_value)(DType dtype, const float* value, int head_dim, int head_pad, int position, char* block);
  // Reset the states of `count` queries; run one task over its positions; merge a later state into an earlier one.
  void (*attention_begin)(float* state, int count, int head_pad);
  void (*attend)(DType dtype, const AttentionTask& task);
  void (*attention_merge)(float* into, const float* from, int count, int head_pad);
  void (*attention_finish)(const float* state, int head_dim, int head_pad, float* out);
  void (*softcap)(float* x, int64_t count, float cap);
  // best[c] = the larger one of x[c] and best[c], and then from[c] = piece; NaN counts as larger, and stays.
  void (*keep_larger)(const float* x, int64_t count, int32_t piece, float* best, int32_t* from);
  // Rows of logits: see gumbel.hpp.
  int64_t (*find_max)(const float* x, int64_t n, float* largest);
  float (*gumbel_scores)(const float* x, int64_t n, float temperature, uint64_t key, uint64_t first, const int64_t* ids,
                         float* scores, float* peak);
  // Softmax and residuals: see softmax.hpp.
  double (*exp_sum)(const float* x, int64_t n, float temperature, float shift, float scale, float* out);
  double (*residual_sum)(float* p, const float* q, int64_t n, float weight);
  void (*fold_max)(const float* x, int64_t blocks, int64_t length, float* out);
  // The entries above a bound (room for n columns), and products with only those rows of a matrix: see shortlist.hpp.
  int64_t (*count_from)(const float* x, int64_t n, float bound);
  int64_t (*collect)(const float* x, int64_t n, float bound, int32_t* columns);
  void (*dot_rows)(const RowMajor& w, const float* z, const int32_t* rows, int64_t count, float* out);
  double (*read_sum)(const char* data, size_t bytes);
  ReadAhead* read_ahead;
  std::atomic<int>* tile_rows;  // TileRows; null: no tiles
};

// The kernels of that name: amx, avx512 (either of avx512_bf16, avx512_vnni), avx_vnni, avx2 or portable. An empty name
// asks OUTRIDER_ISA, and takes the best that this processor runs where that is not set. Throws std::invalid_argument.
const Kernels& find_kernels(const std::string& name = "");
// Names of all tables that this build has and this processor runs, best first.
std::vector<std::string> usable_kernels();
// Names of those that run anywhere or nearly so, slowly, for tests: they are used when asked for by name.
std::vector<std::string> emulated_kernels();
// Whether two tables give the same bits for products of every format that tiles compute, at heights of one and of two
// tiles: what a machine's own tiles have to do beside the emulated ones before they are used.
bool same_products(const Kernels& left, const Kernels& right);
// Why this process cannot use matrix tiles (Intel AMX); empty where it can.
const std::string& why_no_tiles();

}  // namespace outrider
