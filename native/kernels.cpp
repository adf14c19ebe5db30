// Compiled once per instruction set: the compiler's flags and OUTRIDER_ISA (a name) make the difference.
#include "attention.hpp"
#include "gemm.hpp"
#include "masses.hpp"
#include "race.hpp"
#include "rows.hpp"
#include "shortlist.hpp"

#define OUTRIDER_TEXT_(name) #name
#define OUTRIDER_TEXT(name) OUTRIDER_TEXT_(name)

namespace outrider::OUTRIDER_ISA {

// Touches every byte as the kernels do; the sum keeps the loads alive.
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

extern const Kernels table;
const Kernels table = {
    OUTRIDER_TEXT(OUTRIDER_ISA), kPanel, operand_bytes, gemm, prepare, rms_norm, accumulate, activate, rotate,
    store_key, store_value, attention_begin, attend, attention_merge, attention_finish, softcap, find_max, race,
    exps, excess, fold_max, count_from, collect, dot_rows, read_sum,
};

}  // namespace outrider::OUTRIDER_ISA
