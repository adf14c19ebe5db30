#include "draft_loop.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "sampler.hpp"

namespace outrider {

void draft_loop(Stack& stack, KVCache& cache, const Batch& batch, int64_t steps, const int64_t* keys,
                const float* temperatures, int64_t* tokens, float* logits) {
  const int64_t rows = batch.rows, vocabulary = stack.spec().vocabulary;
  std::vector<float> hidden(rows * stack.spec().hidden), raw(rows == 1 ? 0 : rows * vocabulary);
  std::vector<int64_t> drawn(rows), positions(rows), offsets(rows + 1), logits_at(rows);
  std::iota(offsets.begin(), offsets.end(), 0);
  for (int64_t b = 0; b < rows; b++) logits_at[b] = batch.offsets[b + 1] - 1;
  for (int64_t step = 0; step < steps; step++) {
    Batch now = batch;
    if (step) {
      for (int64_t b = 0; b < rows; b++) positions[b] = batch.positions[batch.offsets[b + 1] - 1] + step;
      now = {drawn.data(), positions.data(), batch.slots, offsets.data(), rows, rows};
      std::iota(logits_at.begin(), logits_at.end(), 0);
    }
    PassOutput output;
    output.logits_at = logits_at.data();
    output.logits_rows = rows;
    output.hidden = hidden.data();
    output.logits = rows == 1 ? logits + step * vocabulary : raw.data();  // one row is written where it belongs
    stack.forward(now, cache, PassInput{}, output);
    for (int64_t b = 0; b < rows; b++) {
      float* row = logits + (b * steps + step) * vocabulary;
      if (rows > 1) std::copy_n(raw.data() + b * vocabulary, vocabulary, row);
      if (temperatures[b] > 0)
        gumbel_argmax(row, 1, vocabulary, keys + b * steps + step, temperatures + b, nullptr, &drawn[b]);
      else
        argmax(row, 1, vocabulary, &drawn[b]);
      tokens[b * steps + step] = drawn[b];
    }
  }
}

}  // namespace outrider
