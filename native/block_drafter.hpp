// A block drafter (DSpark, DFlash) drafts in one call: the waiting features become keys and values, a block runs through
// the layers, the heads are applied, and tokens are drawn.
//
// Legend: n rows, K drafts, S slots of a block, D width, F feature width, Vd draft vocabulary, V target vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "markov.hpp"
#include "stack.hpp"
#include "truncation.hpp"

namespace outrider {

// What a block drafter is made of. Embedding and head are read from the stacks that hold them: the drafter's or the
// target's.
struct BlockParts {
  int size = 0;               // S
  int first = 0;              // slot that predicts the first draft: 0 or 1
  int64_t mask_token = 0;
  int vocabulary = 0;         // V
  std::shared_ptr<Stack> layers, embedding, head;
  std::shared_ptr<Stack> fusion;        // [D, F], a stack without layers: its head multiplies features
  std::vector<float> fusion_norm;       // [D]
  std::shared_ptr<MarkovHead> markov;   // null: each draft depends on its own slot alone
  std::shared_ptr<Stack> mix;           // gated and rnn heads: the hidden states' part of their product
  std::vector<float> mix_bias;
  std::vector<float> confidence;        // [D], or [D + r] where the head reads W1 of the token before; empty: no head
  float confidence_bias = 0.0f;
  std::vector<int64_t> ids;             // [Vd] target id of each draft id, ascending; empty: the same
};

// Features of committed tokens that are not in the cache yet, row by row, in pieces.
struct WaitingFeatures {
  struct Piece {
    const float* data;  // [count, F]
    int64_t count;
  };
  std::vector<Piece> pieces;
  const int64_t* counts = nullptr;  // [n] tokens of each row, as many as its pieces have
  const int64_t* slots = nullptr;   // [n] of the cache
  int64_t rows = 0;
};

struct BlockTask {
  WaitingFeatures waiting;    // of the rows that draft
  int64_t drafts = 0;         // K
  const int64_t* lengths;     // [n] drafts that are wanted of each row, 1 to K; the block has no slot for the others
  const int64_t* anchors;     // [n] target ids
  const int64_t* keys;        // [n, K]; null where all rows are greedy
  const float* temperatures;  // [n]; 0: greedy
  const Truncation* truncations;  // [n], of sampled rows
  int64_t* tokens;            // [n, K] target ids
  float* confidence;          // [n, K]: of the confidence head, else sigmoid(largest logit - second)
  // What each draft was drawn from, rows of `width()`: logits / temperature, and target ids, ascending, filled up with V
  // (null where width() is V). Both null where all rows are greedy.
  int64_t* ids;
  float* logits;
};

class BlockDrafter {
 public:
  explicit BlockDrafter(BlockParts parts);
  BlockDrafter(const BlockDrafter&) = delete;

  int feature_width() const { return feature_width_; }
  int drafts() const { return parts_.size - parts_.first; }
  int width() const;  // entries of a distribution: a shortlist, or Vd without a Markov head
  bool lists_ids() const { return parts_.markov || !parts_.ids.empty(); }

  // Appends the keys and values of waiting features to the cache. Throws NoRoom before anything is written.
  void absorb(KVCache& cache, const WaitingFeatures& waiting);
  // The same, then drafts. Leaves the cache as `absorb` would.
  void draft(KVCache& cache, const BlockTask& task);

 private:
  void check_room(const KVCache& cache, const WaitingFeatures& waiting, int64_t more) const;
  void append(KVCache& cache, const WaitingFeatures& waiting);
  void run_block(KVCache& cache, const BlockTask& task);
  void draw_block(const BlockTask& task);
  void draw_independently(const BlockTask& task);
  void rate(const BlockTask& task);

  BlockParts parts_;
  const Kernels& kernels_;
  int feature_width_ = 0;
  std::mutex mutex_;  // one draft at a time: drafts share the buffers below
  std::vector<int64_t> tokens_, positions_, offsets_, wanted_, starts_;
  std::vector<float> features_, context_, embedded_, hidden_, base_, mixed_, embedding_;
};

}  // namespace outrider
