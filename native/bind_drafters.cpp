// Python bindings: drafters that read the target's features, a block at a time or a token at a time.
#include <memory>
#include <vector>

#include "autoregressive.hpp"
#include "bindings.hpp"
#include "block_drafter.hpp"
#include "confidence.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

// Short lists of numbers cross as Python lists: that costs less than an array.
using Ints = std::vector<int64_t>;
// Temperature, top-k, top-p and min-p of each row; a temperature of 0 is greedy.
using Sampling = std::vector<std::tuple<float, int64_t, double, double>>;
using Keys = std::optional<std::vector<Ints>>;  // [n, K]; none where all rows are greedy

// What drafts are drawn by, and how their confidences are scaled.
struct RowSampling {
  std::vector<float> temperatures;
  std::vector<Truncation> truncations;
  std::vector<int64_t> keys;  // [n, K], or empty where all rows are greedy

  const int64_t* keys_or_null() const { return keys.empty() ? nullptr : keys.data(); }
};

RowSampling checked(const Sampling& sampling, const Keys& keys, const Scalings& scalings, int64_t rows, int64_t drafts,
                    bool has_logits) {
  expect_shape("sampling", static_cast<int64_t>(sampling.size()), 1, rows, 1);
  if (!scalings.empty()) expect_shape("scalings", static_cast<int64_t>(scalings.size()), 1, rows, 1);
  RowSampling all;
  if (keys) {
    expect_shape("keys", static_cast<int64_t>(keys->size()), drafts, rows, drafts);
    for (const Ints& row : *keys) {
      expect_shape("keys of a row", 1, static_cast<int64_t>(row.size()), 1, drafts);
      all.keys.insert(all.keys.end(), row.begin(), row.end());
    }
  }
  for (const auto& [temperature, top_k, top_p, min_p] : sampling) {
    if (temperature > 0 && !(keys && has_logits))
      throw std::invalid_argument("sampled rows need keys, and an array for logits");
    if (top_k < 1) throw std::invalid_argument("truncation keeps at least one token");
    all.temperatures.push_back(temperature);
    all.truncations.push_back({top_k, top_p, min_p});
  }
  return all;
}

void scale(const Scalings& scalings, const FloatMatrixOut& confidence) {
  const auto drafts = static_cast<int64_t>(confidence.shape(1));
  for (size_t b = 0; b < scalings.size(); b++)
    if (scalings[b]) scale_confidences(*scalings[b], confidence.data() + static_cast<int64_t>(b) * drafts, drafts);
}

WaitingFeatures waiting_of(const BlockDrafter& drafter, const Ints& slots, const Ints& counts,
                           const std::vector<FloatMatrix>& features) {
  WaitingFeatures waiting;
  waiting.slots = slots.data();
  waiting.counts = counts.data();
  waiting.rows = static_cast<int64_t>(slots.size());
  expect_shape("counts", counts.size(), 1, waiting.rows, 1);
  int64_t given = 0, wanted = 0;
  for (const FloatMatrix& piece : features) {
    expect_matrix("features", piece, piece.shape(0), drafter.feature_width());
    waiting.pieces.push_back({piece.data(), static_cast<int64_t>(piece.shape(0))});
    given += piece.shape(0);
  }
  for (int64_t b = 0; b < waiting.rows; b++) {
    if (counts[b] < 0) throw std::invalid_argument("a row cannot have fewer than 0 waiting tokens");
    wanted += counts[b];
  }
  if (given != wanted)
    throw std::invalid_argument("got features of " + std::to_string(given) + " tokens, expected " + std::to_string(wanted));
  return waiting;
}

void absorb(BlockDrafter& drafter, KVCache& cache, const Ints& slots, const Ints& counts,
            const std::vector<FloatMatrix>& features) {
  const WaitingFeatures waiting = waiting_of(drafter, slots, counts, features);
  nb::gil_scoped_release released;
  drafter.absorb(cache, waiting);
}

void draft(BlockDrafter& drafter, KVCache& cache, const Ints& slots, const Ints& counts,
           const std::vector<FloatMatrix>& features, const Ints& anchors, const Ints& lengths, const Keys& keys,
           const Sampling& sampling, const Scalings& scalings, const IntMatrixOut& tokens,
           const FloatMatrixOut& confidence, const std::optional<IntMatrixOut>& ids,
           const std::optional<FloatMatrixOut>& logits) {
  BlockTask task{};
  task.waiting = waiting_of(drafter, slots, counts, features);
  const int64_t rows = task.waiting.rows;
  task.drafts = tokens.shape(1);
  if (task.drafts < 1 || task.drafts > drafter.drafts())
    throw std::invalid_argument("a block gives 1 to " + std::to_string(drafter.drafts()) + " drafts, got " +
                                std::to_string(task.drafts));
  expect_shape("anchors", static_cast<int64_t>(anchors.size()), 1, rows, 1);
  expect_shape("lengths", static_cast<int64_t>(lengths.size()), 1, rows, 1);
  for (const int64_t length : lengths)
    if (length < 1 || length > task.drafts)
      throw std::invalid_argument("a row's drafts must be 1 to " + std::to_string(task.drafts) + ", got " +
                                  std::to_string(length));
  expect_matrix("tokens", tokens, rows, task.drafts);
  expect_matrix("confidence", confidence, rows, task.drafts);
  if (logits) expect_matrix("logits", *logits, rows * task.drafts, drafter.width());
  if (ids) expect_matrix("ids", *ids, rows * task.drafts, drafter.width());
  const RowSampling row_sampling = checked(sampling, keys, scalings, rows, task.drafts, logits.has_value());
  if (logits && drafter.lists_ids() && !ids) throw std::invalid_argument("this drafter needs an array for ids");
  task.anchors = anchors.data();
  task.lengths = lengths.data();
  task.keys = row_sampling.keys_or_null();
  task.temperatures = row_sampling.temperatures.data();
  task.truncations = row_sampling.truncations.data();
  task.tokens = tokens.data();
  task.confidence = confidence.data();
  task.ids = data_or_null(ids);
  task.logits = data_or_null(logits);
  nb::gil_scoped_release released;
  drafter.draft(cache, task);
  scale(scalings, confidence);
}

void draft_in_turn(AutoregressiveDrafter& drafter, KVCache& cache, const Ints& slots, const Ints& counts,
                   const std::vector<FloatMatrix>& features, const Ints& tokens,
                   const Keys& keys, const Sampling& sampling, const Scalings& scalings, const IntMatrixOut& drawn,
                   const FloatMatrixOut& confidence, const std::optional<IntMatrixOut>& ids,
                   const std::optional<FloatMatrixOut>& logits) {
  AutoregressiveTask task{};
  task.rows = static_cast<int64_t>(slots.size());
  task.drafts = drawn.shape(1);
  if (!task.rows || !task.drafts) throw std::invalid_argument("a draft needs a row and a token at least");
  int64_t given = 0, wanted = 0;
  for (const FloatMatrix& piece : features) {
    expect_matrix("features", piece, piece.shape(0), drafter.feature_width());
    task.features.push_back({piece.data(), static_cast<int64_t>(piece.shape(0))});
    given += piece.shape(0);
  }
  expect_shape("counts", counts.size(), 1, task.rows, 1);
  for (int64_t count : counts) {
    if (count < 1) throw std::invalid_argument("a row that drafts needs a waiting token at least");
    wanted += count;
  }
  if (given != wanted || static_cast<int64_t>(tokens.size()) != wanted)
    throw std::invalid_argument("got features of " + std::to_string(given) + " tokens and " +
                                std::to_string(tokens.size()) + " following tokens, expected " + std::to_string(wanted));
  expect_matrix("drawn", drawn, task.rows, task.drafts);
  expect_matrix("confidence", confidence, task.rows, task.drafts);
  if (logits) expect_matrix("logits", *logits, task.rows * task.drafts, drafter.width());
  if (ids) expect_matrix("ids", *ids, task.rows * task.drafts, drafter.width());
  const RowSampling row_sampling = checked(sampling, keys, scalings, task.rows, task.drafts, logits.has_value());
  if (logits && drafter.lists_ids() && !ids) throw std::invalid_argument("this drafter needs an array for ids");
  task.slots = slots.data();
  task.counts = counts.data();
  task.tokens = tokens.data();
  task.keys = row_sampling.keys_or_null();
  task.temperatures = row_sampling.temperatures.data();
  task.truncations = row_sampling.truncations.data();
  task.drawn = drawn.data();
  task.confidence = confidence.data();
  task.ids = data_or_null(ids);
  task.logits = data_or_null(logits);
  nb::gil_scoped_release released;
  drafter.draft(cache, task);
  scale(scalings, confidence);
}

void bind_autoregressive(nb::module_& m) {
  nb::class_<AutoregressiveParts>(m, "AutoregressiveParts")
      .def(nb::init<>())
      .def_rw("layers", &AutoregressiveParts::layers)
      .def_rw("embedding", &AutoregressiveParts::embedding)
      .def_rw("head", &AutoregressiveParts::head)
      .def_rw("fusion", &AutoregressiveParts::fusion)
      .def_rw("feature_norm", &AutoregressiveParts::feature_norm)
      .def_rw("feature_groups", &AutoregressiveParts::feature_groups)
      .def_rw("embed_norm", &AutoregressiveParts::embed_norm)
      .def_rw("hidden_norm", &AutoregressiveParts::hidden_norm)
      .def_rw("projection", &AutoregressiveParts::projection)
      .def_rw("norm_residual", &AutoregressiveParts::norm_residual)
      .def_rw("feeds_normed", &AutoregressiveParts::feeds_normed)
      .def_rw("ids", &AutoregressiveParts::ids);
  nb::class_<AutoregressiveDrafter>(m, "AutoregressiveDrafter")
      .def(nb::init<AutoregressiveParts>(), "parts"_a)
      .def_prop_ro("width", &AutoregressiveDrafter::width)
      .def_prop_ro("lists_ids", &AutoregressiveDrafter::lists_ids)
      .def("draft", &draft_in_turn, "cache"_a, "slots"_a, "counts"_a, "features"_a, "tokens"_a,
           "keys"_a.none(), "sampling"_a, "scalings"_a, "drawn"_a.noconvert(), "confidence"_a.noconvert(),
           "ids"_a.noconvert().none(), "logits"_a.noconvert().none());
}

}  // namespace

void bind_drafters(nb::module_& m) {
  bind_autoregressive(m);
  nb::class_<BlockParts>(m, "BlockParts")
      .def(nb::init<>())
      .def_rw("size", &BlockParts::size)
      .def_rw("first", &BlockParts::first)
      .def_rw("mask_token", &BlockParts::mask_token)
      .def_rw("vocabulary", &BlockParts::vocabulary)
      .def_rw("layers", &BlockParts::layers)
      .def_rw("embedding", &BlockParts::embedding)
      .def_rw("head", &BlockParts::head)
      .def_rw("fusion", &BlockParts::fusion)
      .def_rw("fusion_norm", &BlockParts::fusion_norm)
      .def_rw("markov", &BlockParts::markov)
      .def_rw("mix", &BlockParts::mix)
      .def_rw("mix_bias", &BlockParts::mix_bias)
      .def_rw("confidence", &BlockParts::confidence)
      .def_rw("confidence_bias", &BlockParts::confidence_bias)
      .def_rw("ids", &BlockParts::ids);
  nb::class_<BlockDrafter>(m, "BlockDrafter")
      .def(nb::init<BlockParts>(), "parts"_a)
      .def_prop_ro("width", &BlockDrafter::width)
      .def_prop_ro("lists_ids", &BlockDrafter::lists_ids)
      .def("absorb", &absorb, "cache"_a, "slots"_a, "counts"_a, "features"_a)
      .def("draft", &draft, "cache"_a, "slots"_a, "counts"_a, "features"_a,
           "anchors"_a, "lengths"_a, "keys"_a.none(), "sampling"_a, "scalings"_a, "tokens"_a.noconvert(),
           "confidence"_a.noconvert(), "ids"_a.noconvert().none(), "logits"_a.noconvert().none());
}

}  // namespace outrider
