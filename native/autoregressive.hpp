// An autoregressive drafter that reads features (EAGLE-3, multi-token prediction) drafts in one call: the waiting
// features are run with the tokens that follow them, then draft after draft on the stack's own state.
//
// Legend: n rows, K drafts, T waiting tokens, D width, F feature width, Vd draft vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "stack.hpp"
#include "truncation.hpp"

namespace outrider {

struct AutoregressiveParts {
  std::shared_ptr<Stack> layers, embedding, head;  // embedding and head: the drafter's or the target's
  std::shared_ptr<Stack> fusion;                   // [D, F]: features to a state; null: they are one
  std::vector<float> feature_norm;                 // [F], before the fusion; empty: none
  int feature_groups = 1;                          // parts of the features that are normalised each by itself
  std::vector<float> embed_norm, hidden_norm;      // [D]
  std::shared_ptr<Stack> projection;               // [D, 2 D]: embedding and state to the layers' input; null: the layers
                                                   // take both side by side, and a residual stream
  bool norm_residual = false;                      // whether that residual stream is the normalised state
  bool feeds_normed = false;                       // whether the state fed back is the one after the final norm
  std::vector<int64_t> ids;                        // [Vd] target id of each draft id, ascending; empty: the same
};

struct AutoregressiveTask {
  int64_t rows = 0, drafts = 0;  // n, K
  const int64_t* slots;          // [n] of the cache
  const int64_t* counts;         // [n] waiting tokens of each row, at least 1; T together
  const int64_t* tokens;         // [T] the token that follows each of them; each row's last one is the row's last token
  struct Piece {
    const float* data;           // [count, F]
    int64_t count;
  };
  std::vector<Piece> features;   // row by row, T together
  const int64_t* keys;           // [n, K]; null where all rows are greedy
  const float* temperatures;      // [n]; 0: greedy
  const Truncation* truncations;  // [n], of sampled rows
  int64_t* drawn;                // [n, K] target ids
  float* confidence;             // [n, K] sigmoid(largest logit - second)
  // What each draft was drawn from, [n K, Vd]: logits / temperature, and target ids where the vocabulary is reduced.
  // Null where all rows are greedy.
  int64_t* ids;
  float* logits;
};

class AutoregressiveDrafter {
 public:
  explicit AutoregressiveDrafter(AutoregressiveParts parts);
  AutoregressiveDrafter(const AutoregressiveDrafter&) = delete;

  int feature_width() const { return feature_width_; }
  int width() const { return parts_.head->spec().vocabulary; }  // Vd
  bool lists_ids() const { return !parts_.ids.empty(); }

  // All waiting tokens but each row's last one stay in the cache: the token that follows it is not certain yet.
  // Throws NoRoom before anything is written.
  void draft(KVCache& cache, const AutoregressiveTask& task);

 private:
  void condition(const AutoregressiveTask& task, int64_t count);
  void fuse(const int64_t* tokens, const float* states, int64_t count);
  void run(KVCache& cache, const Batch& batch, const std::vector<int64_t>& ends);

  AutoregressiveParts parts_;
  const Kernels& kernels_;
  int feature_width_ = 0;
  std::mutex mutex_;  // one draft at a time: drafts share the buffers below
  std::vector<float> features_, states_, wide_, input_, residual_, last_, hidden_, base_;
};

}  // namespace outrider
