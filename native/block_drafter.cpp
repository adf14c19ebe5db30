#include "block_drafter.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "draft_row.hpp"

namespace outrider {

namespace {

double dot(const float* x, const float* y, int count) {
  constexpr int kChains = 8;
  double sums[kChains] = {};
  int i = 0;
  for (; i + kChains <= count; i += kChains)
    for (int c = 0; c < kChains; c++) sums[c] += static_cast<double>(x[i + c]) * y[i + c];
  for (; i < count; i++) sums[0] += static_cast<double>(x[i]) * y[i];
  return std::accumulate(sums, sums + kChains, 0.0);
}

void expect(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(message);
}

}  // namespace

BlockDrafter::BlockDrafter(BlockParts parts) : parts_(std::move(parts)), kernels_(parts_.layers->kernels()) {
  const StackSpec& layers = parts_.layers->spec();
  const auto width = static_cast<size_t>(layers.hidden);
  feature_width_ = parts_.fusion->spec().hidden;
  expect(parts_.size > parts_.first && parts_.first >= 0, "a block needs a slot that predicts");
  expect(parts_.fusion->spec().vocabulary == layers.hidden && parts_.fusion_norm.size() == width,
         "features must be fused to the width of the layers, and normalised");
  expect(parts_.embedding->spec().hidden == layers.hidden && parts_.embedding->spec().embeddings > 0,
         "the embedding must be as wide as the layers");
  expect(parts_.head->spec().hidden == layers.hidden && parts_.head->spec().vocabulary > 0,
         "the head must be as wide as the layers");
  expect(parts_.ids.empty() || parts_.ids.size() == static_cast<size_t>(parts_.head->spec().vocabulary),
         "a reduced vocabulary needs one id for each row of the head");
  const int mixed = parts_.markov ? parts_.markov->mixed_width() : 0;
  expect(!parts_.markov || parts_.markov->spec().drafted == parts_.head->spec().vocabulary,
         "the Markov head must draft the tokens of the head");
  expect(parts_.mix ? parts_.mix->spec().vocabulary == mixed && parts_.mix->spec().hidden == layers.hidden &&
                          parts_.mix_bias.size() == static_cast<size_t>(mixed)
                    : mixed == 0,
         "gated and rnn heads need the product with the hidden states and its bias");
  const size_t rank = parts_.markov ? parts_.markov->spec().rank : 0;
  expect(parts_.confidence.empty() || parts_.confidence.size() == width || parts_.confidence.size() == width + rank,
         "the confidence head must be as wide as the layers, or that and the Markov head's rank");
  embedding_.resize(parts_.markov ? parts_.markov->padded_rank() : 0);
}

int BlockDrafter::width() const { return parts_.markov ? parts_.markov->spec().shortlist : parts_.head->spec().vocabulary; }

// ------------------------------------------------------------------------------------------------ features

void BlockDrafter::absorb(KVCache& cache, const WaitingFeatures& waiting) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_room(cache, waiting, 0);
  append(cache, waiting);
}

// Before anything is written: the caller finds room and calls again.
void BlockDrafter::check_room(const KVCache& cache, const WaitingFeatures& waiting, int64_t more) const {
  for (int64_t b = 0; b < waiting.rows; b++) {
    const int64_t start = cache.lengths().at(waiting.slots[b]);
    expect_room(cache, waiting.slots[b], start, start + waiting.counts[b] + more);
  }
}

void BlockDrafter::append(KVCache& cache, const WaitingFeatures& waiting) {
  int64_t count = 0;
  for (int64_t b = 0; b < waiting.rows; b++) count += waiting.counts[b];
  if (!count) return;
  const float* features = waiting.pieces.front().data;
  if (waiting.pieces.size() > 1) {
    features_.resize(count * feature_width_);
    float* to = features_.data();
    for (const WaitingFeatures::Piece& piece : waiting.pieces)
      to = std::copy_n(piece.data, piece.count * feature_width_, to);
    features = features_.data();
  }
  const int width = parts_.layers->spec().hidden;
  context_.resize(count * width);
  parts_.fusion->unembed(features, count, context_.data());
  for (int64_t t = 0; t < count; t++) {
    float* row = context_.data() + t * width;
    kernels_.rms_norm(row, parts_.fusion_norm.data(), parts_.layers->spec().eps, width, row);
  }
  tokens_.assign(count, 0);
  positions_.clear();
  offsets_.assign(1, 0);
  for (int64_t b = 0; b < waiting.rows; b++) {
    const int64_t start = cache.lengths().at(waiting.slots[b]);
    for (int64_t i = 0; i < waiting.counts[b]; i++) positions_.push_back(start + i);
    offsets_.push_back(offsets_.back() + waiting.counts[b]);
  }
  const Batch batch{tokens_.data(), positions_.data(), waiting.slots, offsets_.data(), waiting.rows, count};
  parts_.layers->project(batch, cache, context_.data());
}

// ------------------------------------------------------------------------------------------------ a block

void BlockDrafter::draft(KVCache& cache, const BlockTask& task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_room(cache, task.waiting, parts_.size);
  append(cache, task.waiting);
  run_block(cache, task);
  if (parts_.markov)
    draw_block(task);
  else
    draw_independently(task);
  if (!parts_.confidence.empty()) rate(task);
}

// Hidden states [n, K, D] and base logits [n, K, Vd] at the slots that predict, those of a row's last slot again where it
// has fewer. The block's own keys and values do not stay in the cache.
void BlockDrafter::run_block(KVCache& cache, const BlockTask& task) {
  const StackSpec& layers = parts_.layers->spec();
  const int64_t rows = task.waiting.rows, drafts = rows * task.drafts;
  tokens_.clear();
  positions_.clear();
  offsets_.assign(1, 0);
  wanted_.clear();
  starts_.resize(rows);
  for (int64_t b = 0; b < rows; b++) {
    const int64_t begin = offsets_[b], size = parts_.first + task.lengths[b];
    starts_[b] = cache.lengths().at(task.waiting.slots[b]);
    tokens_.push_back(task.anchors[b]);
    tokens_.resize(begin + size, parts_.mask_token);
    for (int64_t i = 0; i < size; i++) positions_.push_back(starts_[b] + i);
    for (int64_t k = 0; k < task.drafts; k++) wanted_.push_back(begin + std::min(parts_.first + k, size - 1));
    offsets_.push_back(begin + size);
  }
  const auto count = static_cast<int64_t>(tokens_.size());
  embedded_.resize(count * layers.hidden);
  hidden_.resize(drafts * layers.hidden);
  base_.resize(drafts * parts_.head->spec().vocabulary);
  parts_.embedding->embed(tokens_.data(), count, embedded_.data());
  PassInput input;
  input.hidden = embedded_.data();
  input.causal = false;
  PassOutput output;
  output.logits_at = wanted_.data();
  output.logits_rows = drafts;
  output.hidden = hidden_.data();
  const bool own_head = parts_.head == parts_.layers;
  if (own_head) output.logits = base_.data();
  parts_.layers->forward({tokens_.data(), positions_.data(), task.waiting.slots, offsets_.data(), rows, count}, cache,
                         input, output);
  for (int64_t b = 0; b < rows; b++) cache.lengths()[task.waiting.slots[b]] = starts_[b];
  if (!own_head) parts_.head->unembed(hidden_.data(), drafts, base_.data());
}

void BlockDrafter::draw_block(const BlockTask& task) {
  const int mixed = parts_.markov->mixed_width();
  const int64_t count = task.waiting.rows * task.drafts;
  if (mixed) {
    mixed_.resize(count * mixed);
    parts_.mix->unembed(hidden_.data(), count, mixed_.data());
    for (int64_t i = 0; i < count * mixed; i++) mixed_[i] += parts_.mix_bias[i % mixed];
  }
  MarkovBlock block{};
  block.rows = task.waiting.rows;
  block.drafts = task.drafts;
  block.base = base_.data();
  block.mixed = mixed_.data();
  block.anchors = task.anchors;
  block.keys = task.keys;
  block.temperatures = task.temperatures;
  block.truncations = task.truncations;
  block.tokens = task.tokens;
  block.margins = task.confidence;
  block.ids = task.ids;
  block.logits = task.logits;
  parts_.markov->draft(block);
  if (parts_.confidence.empty())
    for (int64_t i = 0; i < count; i++) task.confidence[i] = sigmoid(task.confidence[i]);
}

void BlockDrafter::draw_independently(const BlockTask& task) {
  const int64_t vocabulary = parts_.head->spec().vocabulary, count = task.waiting.rows * task.drafts;
  const auto pool = shared_pool();
  const auto one = [&](int64_t i) {
    const DraftRow row{base_.data() + i * vocabulary,
                       vocabulary,
                       parts_.ids.empty() ? nullptr : parts_.ids.data(),
                       task.temperatures[i / task.drafts],
                       task.truncations[i / task.drafts],
                       task.keys ? task.keys[i] : 0,
                       task.logits ? task.logits + i * vocabulary : nullptr,
                       task.ids ? task.ids + i * vocabulary : nullptr,
                       false};
    task.tokens[i] = draw_draft(kernels_, row, task.confidence + i);
  };
  pool->run([&](int thread) { pool->parallel_for(thread, count, one); });
  expect(std::none_of(task.tokens, task.tokens + count, [](int64_t token) { return token < 0; }),
         "logits must be numbers, got NaN or infinity; the weights or the input are damaged");
}

// The confidence head (equation 7): it reads the hidden state, and W1 of the token before the draft where it is trained
// so.
void BlockDrafter::rate(const BlockTask& task) {
  const int width = parts_.layers->spec().hidden, more = static_cast<int>(parts_.confidence.size()) - width;
  for (int64_t i = 0; i < task.waiting.rows * task.drafts; i++) {
    double logit = dot(hidden_.data() + i * width, parts_.confidence.data(), width) + parts_.confidence_bias;
    if (more) {
      parts_.markov->embed(i % task.drafts ? task.tokens[i - 1] : task.anchors[i / task.drafts], embedding_.data());
      logit += dot(embedding_.data(), parts_.confidence.data() + width, more);
    }
    task.confidence[i] = sigmoid(logit);
  }
}

}  // namespace outrider
