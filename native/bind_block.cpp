// Python bindings: a block drafter.
#include <memory>
#include <vector>

#include "bindings.hpp"
#include "block_drafter.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

// Short lists of numbers cross as Python lists: that costs less than an array.
using Ints = std::vector<int64_t>;

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
           const std::vector<FloatMatrix>& features, const Ints& anchors,
           const std::optional<IntMatrix>& keys,
           const std::vector<float>& temperatures, const IntMatrixOut& tokens, const FloatMatrixOut& confidence,
           const std::optional<IntMatrixOut>& ids, const std::optional<FloatMatrixOut>& logits) {
  BlockTask task{};
  task.waiting = waiting_of(drafter, slots, counts, features);
  const int64_t rows = task.waiting.rows;
  task.drafts = tokens.shape(1);
  if (task.drafts < 1 || task.drafts > drafter.drafts())
    throw std::invalid_argument("a block gives 1 to " + std::to_string(drafter.drafts()) + " drafts, got " +
                                std::to_string(task.drafts));
  expect_shape("anchors", static_cast<int64_t>(anchors.size()), 1, rows, 1);
  expect_shape("temperatures", temperatures.size(), 1, rows, 1);
  if (keys) expect_matrix("keys", *keys, rows, task.drafts);
  expect_matrix("tokens", tokens, rows, task.drafts);
  expect_matrix("confidence", confidence, rows, task.drafts);
  if (logits) expect_matrix("logits", *logits, rows * task.drafts, drafter.width());
  if (ids) expect_matrix("ids", *ids, rows * task.drafts, drafter.width());
  for (int64_t b = 0; b < rows; b++)
    if (temperatures[b] > 0 && !(keys && logits))
      throw std::invalid_argument("sampled rows need keys, and an array for logits");
  if (logits && drafter.lists_ids() && !ids) throw std::invalid_argument("this drafter needs an array for ids");
  task.anchors = anchors.data();
  task.keys = data_or_null(keys);
  task.temperatures = temperatures.data();
  task.tokens = tokens.data();
  task.confidence = confidence.data();
  task.ids = data_or_null(ids);
  task.logits = data_or_null(logits);
  nb::gil_scoped_release released;
  drafter.draft(cache, task);
}

}  // namespace

void bind_block(nb::module_& m) {
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
           "anchors"_a, "keys"_a.noconvert().none(), "temperatures"_a, "tokens"_a.noconvert(),
           "confidence"_a.noconvert(), "ids"_a.noconvert().none(), "logits"_a.noconvert().none());
}

}  // namespace outrider
