// A step's verdict: which drafts stay, and each row's own token. The rules are those of outrider.acceptance; a law is
// looked at only where the verdict depends on it.
#pragma once

#include <cstdint>

#include "law.hpp"

namespace outrider {

enum class Rule : int64_t { coupled = 0, rejection = 1, block = 2 };

// One row of the control array, all int64.
struct VerdictRow {
  int64_t start;     // first of its keep + 1 places among the target's laws
  int64_t drafted;   // first of its places among the drafter's laws
  int64_t keep;      // drafts to check
  int64_t rule;
  int64_t position;  // of the first draft in the sequence
  int64_t seed;      // the word that stands for the request's seed
  int64_t round;     // what the noise absorbs of the round: its number + 1, 0 under coupled
};
constexpr int64_t kVerdictColumns = sizeof(VerdictRow) / sizeof(int64_t);

// Words of the noise's purposes.
struct Purposes {
  uint64_t accept, own, tokens;
};

struct VerdictTask {
  Laws target;
  const Laws* drafter = nullptr;    // null: deterministic drafts
  int64_t rows = 0, drafts = 0;     // B, K
  const VerdictRow* control = nullptr;
  const int64_t* tokens = nullptr;  // [B, K]
  Purposes purposes{};
  int64_t* out = nullptr;           // [B, K + 2]: accepted drafts; then their tokens, and the row's own behind them
};

// Throws std::invalid_argument for logits that are no numbers.
void verdict(const VerdictTask& task);

}  // namespace outrider
