// Compiled once per instruction set, with its compiler flags and its name in OUTRIDER_ISA: fills one table of kernels.
#include "attention.hpp"
#include "gemm.hpp"
#include "gumbel.hpp"
#include "rows.hpp"
#include "shortlist.hpp"
#include "softmax.hpp"

#define OUTRIDER_TEXT_(name) #name
#define OUTRIDER_TEXT(name) OUTRIDER_TEXT_(name)

namespace outrider::OUTRIDER_ISA {

// Reads every byte as the kernels do, to measure bandwidth; the sum keeps the compiler from removing the loads.
static double read_sum(const char* data, size_t bytes) {
  constexpr size_t step = 8 * sizeof(F);
  F sum[8] = {};
  for (size_t i = 0; i + step <= bytes; i += step) {
    for (int j = 0; j < 8; j++) sum[j] = sum[j] + load(reinterpret_cast<const float*>(data + i) + j * kLanes);
  }
  F total = sum[0];
  for (int j = 1; j < 8; j++) total = total + sum[j];
  return reduce_add(total);
}

#if !defined(OUTRIDER_TILES)
constexpr std::atomic<int>* tile_rows = nullptr;
#endif

extern const Kernels table;
const Kernels table = {
    OUTRIDER_TEXT(OUTRIDER_ISA), kPanel, operand_bytes, inner_unit, gemm, prepare, rms_norm, accumulate, activate, rotate,
    store_key, store_value, attention_begin, attend, attention_merge, attention_finish, softcap, keep_larger, find_max,
    gumbel_scores, exp_sum, residual_sum, fold_max, count_from, collect, dot_rows, read_sum,
    &read_ahead, tile_rows,
};

}  // namespace outrider::OUTRIDER_ISA
