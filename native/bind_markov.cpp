// Python bindings: the Markov head of a block drafter.
#include <memory>

#include "bindings.hpp"
#include "markov.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

std::shared_ptr<MarkovHead> markov_head(const MarkovSpec& spec, const FloatMatrix& w1, const FloatMatrix& w2,
                                        const std::optional<FloatMatrix>& mix, const std::optional<IntVector>& ids) {
  const int rank = spec.rank;
  expect_matrix("w1", w1, spec.vocabulary, rank);
  expect_matrix("w2", w2, spec.drafted, rank);
  if (rank < 1 || 2 * rank > kWidestRow)
    throw std::invalid_argument("a sequential head's rank must be 1 to " + std::to_string(kWidestRow / 2) + ", got " +
                                std::to_string(rank));
  if (spec.drafted < 1) throw std::invalid_argument("a sequential head needs a vocabulary");
  if (spec.dtype != DType::f32 && spec.dtype != DType::bf16)
    throw std::invalid_argument("a sequential head is kept in f32 or bf16");
  if (mix.has_value() == (spec.kind == MarkovKind::vanilla))
    throw std::invalid_argument("gated and rnn heads need a mixing matrix, vanilla ones have none");
  if (mix && spec.kind == MarkovKind::gated) expect_matrix("mix", *mix, rank, rank);
  if (mix && spec.kind == MarkovKind::rnn) expect_matrix("mix", *mix, 3 * rank, 2 * rank);
  if (ids) expect_shape("ids", ids->size(), 1, spec.drafted, 1);
  return std::make_shared<MarkovHead>(spec, w1.data(), w2.data(), data_or_null(mix), data_or_null(ids));
}

void draft(MarkovHead& head, const FloatMatrix& base, const std::optional<FloatMatrix>& mixed, const IntVector& anchors,
           const IntMatrix& keys, const FloatVector& temperatures, const IntMatrixOut& tokens,
           const FloatMatrixOut& margins, const std::optional<IntMatrixOut>& ids,
           const std::optional<FloatMatrixOut>& logits) {
  const MarkovSpec& spec = head.spec();
  MarkovBlock block{};
  block.rows = anchors.size();
  block.drafts = keys.shape(1);
  const int64_t count = block.rows * block.drafts;
  expect_matrix("base", base, count, spec.drafted);
  if (head.mixed_width() && !mixed)
    throw std::invalid_argument("gated and rnn heads need `mixed`, the projection of the hidden states");
  if (mixed) expect_matrix("mixed", *mixed, count, head.mixed_width());
  expect_matrix("keys", keys, block.rows, block.drafts);
  expect_shape("temperatures", temperatures.size(), 1, block.rows, 1);
  expect_matrix("tokens", tokens, block.rows, block.drafts);
  expect_matrix("margins", margins, block.rows, block.drafts);
  for (int64_t b = 0; b < block.rows; b++)
    if (temperatures.data()[b] > 0 && !(ids && logits))
      throw std::invalid_argument("sampled rows need arrays for ids and logits");
  if (ids) expect_matrix("ids", *ids, count, spec.shortlist);
  if (logits) expect_matrix("logits", *logits, count, spec.shortlist);
  block.base = base.data();
  block.mixed = data_or_null(mixed);
  block.anchors = anchors.data();
  block.keys = keys.data();
  block.temperatures = temperatures.data();
  block.tokens = tokens.data();
  block.margins = margins.data();
  block.ids = logits ? data_or_null(ids) : nullptr;
  block.logits = ids ? data_or_null(logits) : nullptr;
  nb::gil_scoped_release released;
  head.draft(block);
}

}  // namespace

void bind_markov(nb::module_& m) {
  nb::enum_<MarkovKind>(m, "MarkovKind")
      .value("vanilla", MarkovKind::vanilla)
      .value("gated", MarkovKind::gated)
      .value("rnn", MarkovKind::rnn);
  nb::class_<MarkovSpec>(m, "MarkovSpec")
      .def(nb::init<>())
      .def_rw("dtype", &MarkovSpec::dtype)
      .def_rw("isa", &MarkovSpec::isa)
      .def_rw("kind", &MarkovSpec::kind)
      .def_rw("rank", &MarkovSpec::rank)
      .def_rw("vocabulary", &MarkovSpec::vocabulary)
      .def_rw("drafted", &MarkovSpec::drafted)
      .def_rw("shortlist", &MarkovSpec::shortlist);
  nb::class_<MarkovHead>(m, "MarkovHead")
      .def(nb::new_(&markov_head), "spec"_a, "w1"_a, "w2"_a, "mix"_a.none(), "ids"_a.none())
      .def_prop_ro("shortlist", [](const MarkovHead& head) { return head.spec().shortlist; })
      .def("draft", &draft, "base"_a.noconvert(), "mixed"_a.noconvert().none(), "anchors"_a.noconvert(),
           "keys"_a.noconvert(), "temperatures"_a.noconvert(), "tokens"_a.noconvert(), "margins"_a.noconvert(),
           "ids"_a.noconvert().none(), "logits"_a.noconvert().none());
}

}  // namespace outrider
