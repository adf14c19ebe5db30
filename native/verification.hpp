// Verification of a step: how many drafted tokens of each row are accepted, and the token that follows them. The rules
// are those of outrider.sampling.verification; a distribution is computed only where the result depends on it.
#pragma once

#include <cstdint>

#include "distribution.hpp"

namespace outrider {

enum class Rule : int64_t { coupled = 0, rejection = 1, block = 2 };

// What is verified of one row of the batch: in the order of the tuple that Python passes.
struct VerificationRow {
  int64_t target_row;   // first of its keep + 1 rows among the target's distributions
  int64_t drafter_row;  // first of its rows among the drafter's distributions
  int64_t keep;         // number of drafts to verify
  int64_t rule;
  int64_t position;     // of the first draft in the sequence
  int64_t seed;         // word of the request's seed
  int64_t round;        // what the noise key absorbs of the round: its number + 1, 0 under coupled
};

// Words that keep the random numbers of different purposes apart (outrider.sampling.rng.purpose_word).
struct Purposes {
  uint64_t accept;      // uniforms that accept drafts
  uint64_t next_token;  // uniforms that sample the recovered or bonus token
  uint64_t gumbel;      // keys of the Gumbel values under coupled
};

struct VerificationTask {
  DistributionRows target;
  const DistributionRows* drafter = nullptr;   // null: deterministic drafts
  int64_t rows = 0, drafts = 0;                // B, K
  const VerificationRow* control = nullptr;    // [B]
  const int64_t* tokens = nullptr;             // [B, K] drafted tokens
  Purposes purposes{};
  int64_t* out = nullptr;  // [B, K + 2]: number accepted; accepted drafts and the token that follows
};

// Throws std::invalid_argument for logits that hold NaN or infinity.
void verify(const VerificationTask& task);

}  // namespace outrider
