// A small model drafts several tokens in one call: pass, draw, pass on what was drawn.
#pragma once

#include <cstdint>

#include "stack.hpp"

namespace outrider {

// Runs `batch`, then steps - 1 passes of one token a row, each drawn from the logits before it.
// keys [B, steps], temperatures [B] (0: the largest logit) -> tokens [B, steps], logits [B, steps, V].
void chain(Stack& stack, Cache& cache, const Batch& batch, int64_t steps, const int64_t* keys,
           const float* temperatures, int64_t* tokens, float* logits);

}  // namespace outrider
