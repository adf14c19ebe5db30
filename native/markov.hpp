// The sequential head of a block drafter (DSpark's Markov head): drafts a block token by token, in one call.
//
// Draft k is chosen from base[k] + W2 z_k, where z_k depends on draft k - 1. The correction W2 z_k is computed only for
// a shortlist, the tokens with the largest base logits: all of W2 would have to be read for every draft otherwise. A
// greedy draft is the argmax over the shortlist; of trained drafters' drafts one in 200 to 1,000 is another one over the
// whole vocabulary, and no more are accepted. Sampled drafts are drawn from the distribution over the shortlist, and
// that is the distribution reported.
//
// Legend: n rows, K drafts, Vd draft vocabulary, V target vocabulary, r rank, S entries of a shortlist.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"
#include "sampler.hpp"
#include "threadpool.hpp"
#include "truncation.hpp"

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
  const float* mixed;         // [n, K, mixed_width]: the mixing layer's projection of the hidden states, with its bias
  const int64_t* anchors;     // [n], target ids
  const int64_t* keys;        // [n, K]; null where all rows are greedy
  const float* temperatures;  // [n]; 0: greedy
  const Truncation* truncations;  // [n], of sampled rows: applied to what the shortlist holds; null: none
  int64_t* tokens;            // [n, K], target ids
  float* margins;             // [n, K]: the largest corrected logit minus the second
  // The distribution each draft was drawn from, [n, K, S]: target ids, ascending, filled up with V; logits /
  // temperature. Greedy rows have one token with all the probability. Both null where all rows are greedy.
  int64_t* ids;
  float* logits;
};

class MarkovHead {
 public:
  // w1 [V, r], w2 [Vd, r]; mix: null for vanilla, [r, r] for gated (applied to the token's embedding), [3r, 2r] for rnn
  // (applied to state and embedding). ids [Vd]: the target id of each draft id, ascending; null where they are the
  // same.
  MarkovHead(MarkovSpec spec, const float* w1, const float* w2, const float* mix, const int64_t* ids);
  MarkovHead(const MarkovHead&) = delete;

  const MarkovSpec& spec() const { return spec_; }
  int mixed_width() const;  // 0 for vanilla
  int padded_rank() const { return w1_.inner; }
  void embed(int64_t token, float* out) const;  // W1 of a target id, padded with zeros to padded_rank()
  void draft(const MarkovBlock& block);

 private:
  struct Shortlist {              // the tokens that a draft is chosen from
    int32_t* tokens;              // [S] draft ids, ascending
    float* base;                  // [S] their base logits
    int64_t count;                // of both
  };
  struct Reach {                  // see find_reach
    float bound, above;
  };
  struct Largest {                // corrected logits of a shortlist, or of a part of it that one thread computes
    float largest = 0.0f, second = 0.0f;
    int64_t index = 0;            // within the list, of the first largest
  };
  // What the threads that draft a sequence share of one draft.
  struct Draft {
    std::vector<float> logits;    // corrected, one per token of the shortlist
    std::vector<Largest> parts;
    std::vector<ScoredPiece> scored;  // sampled drafts: the same parts
    int64_t drawn = 0;            // index of a draft that one thread draws alone
  };
  // Of one sequence. Drafts take turns with two buffers: a thread may still read one while another begins the next.
  struct Sequence {
    Draft drafts[2];
    std::vector<float> mixed;     // output of the mixing matrix
  };
  // The state of one sequence, updated draft by draft. Threads that share a sequence keep it each for themselves.
  struct State {
    int64_t previous = 0;        // the token before the draft, target id
    std::vector<float> input;    // of the mixing matrix: state (rnn only), embedding of the token
    std::vector<float> mixed;
    std::vector<float> latent;   // z
  };
  // Who drafts a sequence: one thread alone, or all threads of a job together.
  class Team;

  RowMajor pack(const float* matrix, int64_t rows, int width);
  void fill_shortlist(const float* base, Shortlist& list, int32_t* room) const;
  float sampled_bound(const float* base, int64_t wanted) const;
  Reach find_reach(const float* x, int64_t n, float peak, float first, int64_t least, int64_t most) const;
  void list_ids(const Shortlist& list, int64_t* ids, float* logits) const;
  Sequence new_sequence(int threads) const;
  bool draft_sequence(const Team& team, const MarkovBlock& block, int64_t row, const Shortlist* lists,
                      Sequence& sequence) const;
  void compute_latent(const Team& team, const float* mixed, Sequence& sequence, State& state) const;
  Largest correct(const Team& team, const float* latent, const Shortlist& list, Draft& draft, int64_t key,
                  float temperature, const int64_t* ids, float* logits) const;
  int64_t draw_alone(const Draft& draft, int64_t count, float largest, int64_t key, float temperature,
                     const Truncation* truncation, const int64_t* ids, float* logits) const;
  int64_t target_id(int32_t draft_id) const { return ids_.empty() ? draft_id : ids_[draft_id]; }

  MarkovSpec spec_;
  const Kernels& kernels_;
  Arena arena_;
  RowMajor w1_, w2_, mix_;
  std::vector<int32_t> mix_rows_;  // 0, 1, ..., mixed_width - 1
  std::vector<int64_t> ids_;
};

}  // namespace outrider
