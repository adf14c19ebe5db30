// One forward pass of one chunk of a batch: the workspace, and how the work is shared between threads.
//
// With up to kReplicatedRows rows every thread keeps its own copy of the residual stream and prepares every operand
// itself: that costs less than another barrier. With more rows, or once a thread was missing, each row is prepared by
// one thread, followed by a barrier. The arithmetic of a row is the same either way.
//
// A pass is several jobs of the pool, since a thread that has lost its core to something else can join at the beginning
// of a job only: in a server the rest of a long pass would be left to one thread.
#pragma once

#include "stack.hpp"
#include "threadpool.hpp"

namespace outrider {

constexpr int kChunkRows = 256;  // tokens that go through the stack together
constexpr int kReplicatedRows = 16;
constexpr int kReplicatedThreads = 8;
constexpr size_t kJobWork = size_t{24} << 20;  // multiplications of a job, about: a few hundred microseconds
constexpr int kQueryTile = 128;  // queries of one unit: their states stay in cache while keys and values are read

// The part of one row of the batch that lies in a chunk. Tokens are numbered within the chunk.
struct Segment {
  int slot;
  int64_t start;  // position of its first token
  int first, count;
};

struct Chunk {
  int64_t first = 0;  // of the packed tokens
  int count = 0;
  std::vector<Segment> segments;
  std::vector<int> logits_token;    // token within the chunk ...
  std::vector<int64_t> logits_row;  // ... and its row of the outputs
};

// Queries of some tokens of one segment against one key/value head, over positions [begin, end).
struct AttentionUnit {
  int segment, kv_head, token, tokens;  // tokens within the segment
  int64_t begin, end;
  size_t state = 0;  // with split plans: offset of its partial states, in floats
};

// How a layer's attention is split up. Units are ordered by key/value head, with the same number for each.
struct AttentionPlan {
  bool by_head = false;  // the thread that projects a key/value head also runs its units: no barrier in between
  bool split = false;    // units are splits of a query's positions, merged in order after a barrier
  std::vector<AttentionUnit> units;
  std::vector<int> targets;  // with split: index of the first unit of each group of queries, then the end
  size_t states = 0;         // floats
};

AttentionPlan plan_attention(const Layer& layer, const std::vector<Segment>& segments, bool causal, int threads);

// Scratch memory of one pass, inside a region that only grows.
struct Workspace {
  struct Local {
    float *x, *row, *tile, *state;
    float* best;    // of each logits row and column of a panel: the largest logit that this thread has computed ...
    int32_t* from;  // ... and the panel that it came from, -1 for none
    Operand operand;
  };
  float *x, *y, *attention, *inner, *partial;
  size_t x_stride, attention_stride, inner_stride, tile_stride;  // floats
  char* queries;
  Operand operand;
  std::vector<Local> local;
};

class Pass {
 public:
  static constexpr int kNone = -2;

  Pass(Stack& stack, KVCache* cache, ThreadPool& pool, const PassInput& input, const PassOutput& output);

  void forward(const Batch& batch, const Chunk& chunk);
  void project(const Chunk& chunk, const float* hidden);
  void unembed(const float* hidden, int64_t rows);  // to output.logits

 private:
  // The output of an attention or MLP block that is not yet added to the residual stream.
  struct Pending {
    const float* y = nullptr;
    const std::vector<float>* gain = nullptr;
    float scalar = 1.0f;
    int layer = kNone;  // the layer whose residual is complete once this is added; -1: the embedding
  };

  void allocate(int rows, size_t partial);
  void run_layers(int thread, size_t first, size_t last);
  size_t weights(const Layer& layer) const;
  Pending pending_before(size_t layer) const;
  void stop_replicating();
  void load_residual(int thread, const int64_t* tokens);
  void attention(int thread, size_t index, Pending pending);
  void mlp(int thread, const Layer& layer, Pending pending);
  void finish(int thread, Pending pending);
  void add_pending(int thread, int row, const Pending& pending);
  void store_features(int layer, int row, const float* x) const;
  template <class Row>
  Operand prepare(int thread, int rows, const Linear& linear, int width, const float* gain, Row&& row);
  Operand convert(int thread, const Linear& linear, float* rows, size_t stride, int width);
  void project_rows(int thread, const Linear& linear, const Operand& x, float* y);
  void project_head(int thread, size_t index, const Operand& x, int kv_head, int part);
  void store_key_value(int thread, size_t index, int kv_head, int part, const float* tile);
  void attend(int thread, size_t index, const AttentionUnit& unit, float* state, bool finish);
  void merge_splits(const Layer& layer, const AttentionPlan& plan, int target);
  void write_attention(const Layer& layer, const AttentionUnit& unit, const float* state);
  void logits(int thread, const Operand& x, int rows, const int64_t* at);
  void write_largest() const;

  template <class Item>
  void for_each_row(int thread, int rows, Item&& item);
  float* residual(int thread, int row) const;

  Stack& stack_;
  KVCache* cache_;
  ThreadPool& pool_;
  const Kernels& kernels_;
  const PassInput& input_;
  const PassOutput& output_;
  const Chunk* chunk_ = nullptr;
  Workspace space_;
  std::vector<AttentionPlan> plans_;
  std::vector<int> plan_of_layer_;
  bool replicated_ = true;  // every thread has its own copy of all rows
  int rows_ = 0;  // tokens of the chunk
};

}  // namespace outrider
