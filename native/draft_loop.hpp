// An autoregressive drafter drafts several tokens in one call: forward pass, draw a token, forward pass on it, ...
#pragma once

#include <cstdint>

#include "stack.hpp"

namespace outrider {

// Runs `batch`, then steps - 1 passes over one token a row, each drawn from the logits of the pass before it. The last
// token drawn is not run. keys [B, steps] of the Gumbel values, temperatures [B] (0: the largest logit)
// -> tokens [B, steps], logits [B, steps, V] before temperature.
void draft_loop(Stack& stack, KVCache& cache, const Batch& batch, int64_t steps, const int64_t* keys,
                const float* temperatures, int64_t* tokens, float* logits);

}  // namespace outrider
