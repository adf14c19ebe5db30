// The sequential head of a block drafter (DSpark's Markov head): a block's drafts one after the other, in one call.
//
// Draft k is chosen from base[k] + W2 z_k, where z_k comes from the draft before it. Only a shortlist of tokens is ever
// corrected: those whose base logits are largest. For greedy drafts |W2[v] z| <= |W2[v]| |z| shows which tokens outside
// could win; where those are few they are computed too, and the draft is the largest of all. Sampled drafts are drawn
// from the shortlist's law, which is the law reported. The full law would mean reading all of W2 for every draft.
//
// Legend: n rows, K drafts, Vd draft vocabulary, V target vocabulary, r rank, S entries of a shortlist.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"
#include "threadpool.hpp"

namespace outrider {

enum class MarkovKind : int { vanilla = 0, gated = 1, rnn = 2 };

struct MarkovSpec {
  DType dtype = DType::f32;  // of W1, W2 and the mixing matrix: f32 or bf16
  std::string isa;
  MarkovKind kind = MarkovKind::vanilla;
  int rank = 0, vocabulary = 0, drafted = 0;  // r, V, Vd
  int shortlist = 0;                          // S, at most Vd
};

struct MarkovBlock {
  int64_t rows, drafts;       // n, K
  const float* base;          // [n, K, Vd]
  const float* mixed;         // [n, K, mixed_width]: what the mixing makes of the hidden states, with its bias
  const int64_t* anchors;     // [n], target ids
  const int64_t* keys;        // [n, K]
  const float* temperatures;  // [n]; 0: the largest
  int64_t* tokens;            // [n, K], target ids
  float* margins;             // [n, K]: the largest corrected logit minus the second
  // What each draft was drawn from, [n, K, S]: target ids, ascending, V for no token; logits over the temperature. A
  // greedy row's is certain. Both null where all rows are greedy.
  int64_t* ids;
  float* logits;
};

class MarkovHead {
 public:
  // w1 [V, r], w2 [Vd, r]; mix [r, r] gated (of the token), [3r, 2r] rnn (of state and token); ids [Vd]: the target's
  // id of each draft id, ascending, or null where they are the same.
  MarkovHead(MarkovSpec spec, const float* w1, const float* w2, const float* mix, const int64_t* ids);
  MarkovHead(const MarkovHead&) = delete;

  const MarkovSpec& spec() const { return spec_; }
  int mixed_width() const;  // 0 where nothing is mixed
  void draft(const MarkovBlock& block);

 private:
  struct List {                   // the tokens that a draft is chosen from
    float cut = 0.0f;             // all others' base logits are smaller
    std::vector<int32_t> places;  // draft ids, ascending
  };
  struct Row {                    // where one row of the block stands
    int64_t previous = 0;         // the token before, target id
    std::vector<float> input;     // of the mixing: state (rnn), embedding of the token
    std::vector<float> mixed;
    std::vector<float> latent;    // z
    float size = 0.0f;            // |z|, rounded up
    std::vector<float> logits;    // corrected, of its list
    int64_t best = 0;             // where the largest of them first stands
    float largest = 0.0f, second = 0.0f;
  };

  RowMajor pack(const float* matrix, int64_t rows, int width);
  void choose(const float* base, List& list) const;
  void advance(ThreadPool& pool, const float* mixed, Row& row) const;
  void correct(ThreadPool& pool, const float* base, const List& list, Row& row) const;
  void complete(ThreadPool& pool, const float* base, List& list, Row& row) const;
  int64_t draw(const List& list, const Row& row, int64_t key, float temperature, int64_t* ids, float* logits) const;
  int64_t target_id(int32_t place) const { return ids_.empty() ? place : ids_[place]; }

  MarkovSpec spec_;
  const Kernels& kernels_;
  Arena arena_;
  RowMajor w1_, w2_, mix_;
  std::vector<int32_t> mix_rows_;  // all of them
  std::vector<float> norms_;  // |W2[v]|, rounded up
  float largest_norm_ = 0.0f;
  std::vector<int64_t> ids_;
};

}  // namespace outrider
