// One chunk of a batch on its way through the stack: who works on what, and where intermediate rows lie.
//
// Up to kPrivateRows rows every thread keeps its own copy of the residual stream and prepares every operand itself:
// that costs less than another barrier. With more rows each is prepared by one thread, and all meet. The arithmetic
// of a row is the same either way.
#pragma once

#include "stack.hpp"

namespace outrider {

constexpr int kChunkRows = 256;  // tokens that go through the stack together
constexpr int kPrivateRows = 16;
constexpr int kPrivateThreads = 8;
constexpr int kQueryTile = 128;  // queries whose states stay in cache while keys and values stream by

// A piece of one row of the batch. Tokens are numbered within the chunk.
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
  size_t state = 0;  // with split plans: where its partial states lie, in floats
};

// How a layer's attention is cut up. Units come key/value head by head, the same number for each.
struct AttentionPlan {
  bool by_head = false;  // whoever projects a key/value head runs its units too: no barrier between
  bool split = false;    // units are parts of a query's positions: merged in order after a barrier
  std::vector<AttentionUnit> units;
  std::vector<int> targets;  // with split: index of the first unit of each group of queries, then the end
  size_t states = 0;         // floats
};

AttentionPlan plan_attention(const Layer& layer, const std::vector<Segment>& segments, bool causal, int threads);

// Memory of one pass, carved from a region that only grows.
struct Workspace {
  struct Local {
    float *x, *row, *tile, *state;
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
  Pass(Stack& stack, Cache* cache, ThreadPool& pool, const PassInput& input, const PassOutput& output);

  void forward(const Batch& batch, const Chunk& chunk);
  void project(const Chunk& chunk, const float* hidden);
  void unembed(const float* hidden, int64_t rows);  // to output.logits

 private:
  struct Pending {  // an output not yet added to the residual stream
    const float* y = nullptr;
    const std::vector<float>* gain = nullptr;
    float scalar = 1.0f;
    int tap = -2;  // the layer whose residual is then complete
  };

  void layout(int rows, size_t partial);
  void work(int thread, const Batch& batch);
  void enter(int thread, const int64_t* tokens);
  void attention(int thread, size_t index, Pending pending);
  void mlp(int thread, const Layer& layer, Pending pending);
  void leave(int thread, Pending pending);
  void settle(int thread, int row, const Pending& pending);
  void tap(int layer, int row, const float* x) const;
  template <class Row>
  Operand prepare(int thread, int rows, const Linear& linear, int width, const float* gain, Row&& row);
  Operand convert(int thread, const Linear& linear, float* rows, size_t stride, int width);
  void project_rows(int thread, const Linear& linear, const Operand& x, float* y);
  void head(int thread, size_t index, const Operand& x, int kv_head, int part);
  void key_value(int thread, size_t index, int kv_head, int part, const float* tile);
  void run_unit(int thread, size_t index, const AttentionUnit& unit, float* state, bool finish);
  void merge_unit(const Layer& layer, const AttentionPlan& plan, int target);
  void write_attention(const Layer& layer, const AttentionUnit& unit, const float* state);
  void logits(int thread, const Operand& x, int rows, const int64_t* at);

  template <class Item>
  void each_row(int thread, int rows, Item&& item);
  float* residual(int thread, int row) const;

  Stack& stack_;
  Cache* cache_;
  ThreadPool& pool_;
  const Kernels& kernels_;
  const PassInput& input_;
  const PassOutput& output_;
  const Chunk* chunk_ = nullptr;
  Workspace space_;
  std::vector<AttentionPlan> plans_;
  std::vector<int> plan_of_layer_;
  bool private_ = true;
  int rows_ = 0;  // tokens of the chunk
};

}  // namespace outrider
