#include "autoregressive.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "draft_row.hpp"

namespace outrider {

namespace {

void expect(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(message);
}

}  // namespace

AutoregressiveDrafter::AutoregressiveDrafter(AutoregressiveParts parts)
    : parts_(std::move(parts)), kernels_(parts_.layers->kernels()) {
  const int width = parts_.layers->spec().hidden;
  const auto size = static_cast<size_t>(width);
  feature_width_ = parts_.fusion ? parts_.fusion->spec().hidden : width;
  expect(parts_.embedding->spec().hidden == width && parts_.embedding->spec().embeddings > 0,
         "the embedding must be as wide as the layers");
  expect(parts_.head->spec().hidden == width && parts_.head->spec().vocabulary > 0,
         "the head must be as wide as the layers");
  expect(!parts_.fusion || parts_.fusion->spec().vocabulary == width, "features must be fused to the layers' width");
  expect(parts_.feature_norm.empty() || (parts_.feature_norm.size() == static_cast<size_t>(feature_width_) &&
                                         parts_.feature_groups > 0 && feature_width_ % parts_.feature_groups == 0),
         "the norm of the features must be as wide as they are, in equal parts");
  expect(parts_.embed_norm.size() == size && parts_.hidden_norm.size() == size,
         "embedding and state need norms of the layers' width");
  expect(parts_.projection ? parts_.projection->spec().hidden == 2 * width && parts_.projection->spec().vocabulary == width
                           : parts_.layers->spec().input_width == 2 * width,
         "the layers must take embedding and state side by side, or projected to their width");
  expect(parts_.ids.empty() || parts_.ids.size() == static_cast<size_t>(parts_.head->spec().vocabulary),
         "a reduced vocabulary needs one id for each row of the head");
}

// The states that drafting starts from, [T, D].
void AutoregressiveDrafter::condition(const AutoregressiveTask& task, int64_t count) {
  features_.resize(count * feature_width_);
  float* to = features_.data();
  for (const AutoregressiveTask::Piece& piece : task.features)
    to = std::copy_n(piece.data, piece.count * feature_width_, to);
  if (!parts_.feature_norm.empty()) {
    const int part = feature_width_ / parts_.feature_groups;
    for (int64_t t = 0; t < count; t++)
      for (int g = 0; g < parts_.feature_groups; g++) {
        float* x = features_.data() + t * feature_width_ + g * part;
        kernels_.rms_norm(x, parts_.feature_norm.data() + g * part, parts_.layers->spec().eps, part, x);
      }
  }
  if (!parts_.fusion) {
    states_ = features_;
    return;
  }
  states_.resize(count * parts_.layers->spec().hidden);
  parts_.fusion->unembed(features_.data(), count, states_.data());
}

// The layers' input, from states [count, D] and the tokens that follow them.
void AutoregressiveDrafter::fuse(const int64_t* tokens, const float* states, int64_t count) {
  const int width = parts_.layers->spec().hidden;
  const float eps = parts_.layers->spec().eps;
  wide_.resize(count * 2 * width);
  input_.resize(count * width);
  residual_.resize(count * width);
  parts_.embedding->embed(tokens, count, input_.data());
  for (int64_t t = 0; t < count; t++) {
    float* row = wide_.data() + t * 2 * width;
    kernels_.rms_norm(input_.data() + t * width, parts_.embed_norm.data(), eps, width, row);
    kernels_.rms_norm(states + t * width, parts_.hidden_norm.data(), eps, width, row + width);
    const float* residual = parts_.norm_residual ? row + width : states + t * width;
    std::copy_n(residual, width, residual_.data() + t * width);
  }
  if (parts_.projection) parts_.projection->unembed(wide_.data(), count, input_.data());
}

// Runs what `fuse` made. Leaves the states to feed on in states_ and the logits in base_, one row for each end.
void AutoregressiveDrafter::run(KVCache& cache, const Batch& batch, const std::vector<int64_t>& ends) {
  const int width = parts_.layers->spec().hidden;
  const auto rows = static_cast<int64_t>(ends.size());
  hidden_.resize(rows * width);
  base_.resize(rows * this->width());
  last_.resize(batch.count * width);
  PassInput input;
  input.hidden = parts_.projection ? input_.data() : wide_.data();
  if (!parts_.projection) input.residual = residual_.data();
  PassOutput output;
  output.logits_at = ends.data();
  output.logits_rows = rows;
  output.hidden = hidden_.data();
  if (!parts_.feeds_normed) {
    output.aux_layers = {static_cast<int>(parts_.layers->spec().layers.size()) - 1};
    output.features = last_.data();
  }
  const bool own_head = parts_.head == parts_.layers;
  if (own_head) output.logits = base_.data();
  parts_.layers->forward(batch, cache, input, output);
  if (!own_head) parts_.head->unembed(hidden_.data(), rows, base_.data());
  states_.resize(rows * width);
  for (int64_t b = 0; b < rows; b++)
    std::copy_n(parts_.feeds_normed ? hidden_.data() + b * width : last_.data() + ends[b] * width, width,
                states_.data() + b * width);
}

void AutoregressiveDrafter::draft(KVCache& cache, const AutoregressiveTask& task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t rows = task.rows, vocabulary = width();
  std::vector<int64_t> positions, offsets{0}, ends(rows), kept(rows), next(rows), drawn(rows), each(rows + 1);
  for (int64_t b = 0; b < rows; b++) {
    const int64_t start = cache.lengths().at(task.slots[b]);
    expect_room(cache, task.slots[b], start, start + task.counts[b] + task.drafts - 1);
    for (int64_t i = 0; i < task.counts[b]; i++) positions.push_back(start + i);
    offsets.push_back(offsets.back() + task.counts[b]);
    ends[b] = offsets.back() - 1;
    kept[b] = start + task.counts[b] - 1;
    next[b] = start + task.counts[b];
  }
  const int64_t count = offsets.back();
  condition(task, count);
  fuse(task.tokens, states_.data(), count);
  run(cache, {task.tokens, positions.data(), task.slots, offsets.data(), rows, count}, ends);
  std::iota(each.begin(), each.end(), 0);
  std::iota(ends.begin(), ends.end(), 0);
  bool numbers = true;
  for (int64_t k = 0; k < task.drafts && numbers; k++) {
    if (k) {
      fuse(drawn.data(), states_.data(), rows);
      run(cache, {drawn.data(), next.data(), task.slots, each.data(), rows, rows}, ends);
      for (int64_t& position : next) position++;
    }
    for (int64_t b = 0; b < rows; b++) {
      const int64_t i = b * task.drafts + k;
      const DraftRow row{base_.data() + b * vocabulary,
                         vocabulary,
                         parts_.ids.empty() ? nullptr : parts_.ids.data(),
                         task.temperatures[b],
                         task.truncations[b],
                         task.keys ? task.keys[i] : 0,
                         task.logits ? task.logits + i * vocabulary : nullptr,
                         task.ids ? task.ids + i * vocabulary : nullptr,
                         true};
      drawn[b] = task.drawn[i] = draw_draft(kernels_, row, task.confidence + i);
      numbers = numbers && drawn[b] >= 0;
    }
  }
  for (int64_t b = 0; b < rows; b++) cache.lengths()[task.slots[b]] = kept[b];
  expect(numbers, "logits must be numbers, got NaN or infinity; the weights or the input are damaged");
}

}  // namespace outrider
