// The Python side of the core: tensors cross by DLPack, shapes and types are checked here, the lock is released
// while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>

#include "arena.hpp"
#include "chain.hpp"
#include "markov.hpp"
#include "sampler.hpp"
#include "stack.hpp"
#include "verdict.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace outrider {

namespace {

using Ints = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IntRows = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IntsOut = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntRowsOut = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void expect_shape(const char* name, int64_t rows, int64_t width, int64_t want_rows, int64_t want_width) {
  if (rows == want_rows && width == want_width) return;
  throw std::invalid_argument(std::string(name) + " has shape [" + std::to_string(rows) + ", " + std::to_string(width) +
                              "], expected [" + std::to_string(want_rows) + ", " + std::to_string(want_width) + "]");
}

void expect_rows(const char* name, const Rows& array, int64_t rows, int64_t width) {
  expect_shape(name, array.shape(0), array.shape(1), rows, width);
}

void expect_choices(const Rows& logits, size_t values) {
  if (!logits.shape(1)) throw std::invalid_argument("logits need at least one column");
  expect_shape("an argument with one value per row of logits", values, 1, logits.shape(0), 1);
}

Batch batch_of(const Ints& tokens, const Ints& positions, const Ints& slots, const Ints& offsets) {
  if (positions.size() != tokens.size() || offsets.size() != slots.size() + 1)
    throw std::invalid_argument("a batch needs as many positions as tokens, and one more offset than slots");
  return {tokens.data(), positions.data(), slots.data(), offsets.data(), static_cast<int64_t>(slots.size()),
          static_cast<int64_t>(tokens.size())};
}

void forward(Stack& stack, Cache& cache, const Ints& tokens, const Ints& positions, const Ints& slots,
             const Ints& offsets, bool causal, const std::vector<int>& taps, const std::optional<Rows>& hidden,
             const std::optional<Rows>& residual, const std::optional<Ints>& logits_at, const RowsOut& hidden_out,
             const std::optional<RowsOut>& logits, const std::optional<RowsOut>& features) {
  const StackSpec& spec = stack.spec();
  const Batch batch = batch_of(tokens, positions, slots, offsets);
  PassInput input;
  input.causal = causal;
  if (hidden) {
    expect_rows("hidden", *hidden, batch.count, spec.input_width ? spec.input_width : spec.hidden);
    input.hidden = hidden->data();
  }
  if (residual) {
    expect_rows("residual", *residual, batch.count, spec.hidden);
    input.residual = residual->data();
  }
  if (spec.input_width && !(hidden && residual))
    throw std::invalid_argument("a stack with an input width needs both hidden and residual");
  if (!spec.input_width && residual) throw std::invalid_argument("residual is for stacks with an input width only");
  PassOutput output;
  output.taps = taps;
  for (int layer : taps)
    if (layer < -1 || layer >= static_cast<int>(spec.layers.size()))
      throw std::invalid_argument("tap " + std::to_string(layer) + " is outside -1 .. " +
                                  std::to_string(spec.layers.size() - 1));
  if (!taps.empty() && !features) throw std::invalid_argument("taps need a features array");
  output.logits_rows = logits_at ? logits_at->size() : batch.count;
  output.logits_at = logits_at ? logits_at->data() : nullptr;
  expect_shape("hidden_out", hidden_out.shape(0), hidden_out.shape(1), output.logits_rows, spec.hidden);
  output.hidden = hidden_out.data();
  if (logits) {
    expect_shape("logits", logits->shape(0), logits->shape(1), output.logits_rows, spec.vocabulary);
    output.logits = logits->data();
  }
  if (features) {
    expect_shape("features", features->shape(0), features->shape(1), batch.count, taps.size() * spec.hidden);
    output.features = features->data();
  }
  nb::gil_scoped_release released;
  stack.forward(batch, cache, input, output);
}

std::unique_ptr<MarkovHead> markov_head(const MarkovSpec& spec, const Rows& w1, const Rows& w2,
                                        const std::optional<Rows>& mix, const std::optional<Ints>& ids) {
  const int rank = spec.rank;
  expect_rows("w1", w1, spec.vocabulary, rank);
  expect_rows("w2", w2, spec.drafted, rank);
  if (rank < 1 || 2 * rank > kWidestRow)
    throw std::invalid_argument("a sequential head's rank must be 1 to " + std::to_string(kWidestRow / 2) + ", got " +
                                std::to_string(rank));
  if (spec.drafted < 1) throw std::invalid_argument("a sequential head needs a vocabulary");
  if (spec.dtype != DType::f32 && spec.dtype != DType::bf16)
    throw std::invalid_argument("a sequential head is kept in f32 or bf16");
  if (mix.has_value() == (spec.kind == MarkovKind::vanilla))
    throw std::invalid_argument("gated and rnn heads need a mixing matrix, vanilla ones have none");
  if (mix && spec.kind == MarkovKind::gated) expect_rows("mix", *mix, rank, rank);
  if (mix && spec.kind == MarkovKind::rnn) expect_rows("mix", *mix, 3 * rank, 2 * rank);
  if (ids) expect_shape("ids", ids->size(), 1, spec.drafted, 1);
  return std::make_unique<MarkovHead>(spec, w1.data(), w2.data(), mix ? mix->data() : nullptr,
                                      ids ? ids->data() : nullptr);
}

void markov_draft(MarkovHead& head, const Rows& base, const std::optional<Rows>& mixed, const Ints& anchors,
                  const IntRows& keys, const Vector& temperatures, const IntRowsOut& tokens, const RowsOut& margins,
                  const std::optional<IntRowsOut>& ids, const std::optional<RowsOut>& logits) {
  const MarkovSpec& spec = head.spec();
  MarkovBlock block{};
  block.rows = anchors.size();
  block.drafts = keys.shape(1);
  const int64_t count = block.rows * block.drafts;
  expect_rows("base", base, count, spec.drafted);
  if (head.mixed_width() && !mixed) throw std::invalid_argument("this head mixes: give what it makes of the hidden states");
  if (mixed) expect_rows("mixed", *mixed, count, head.mixed_width());
  expect_shape("keys", keys.shape(0), keys.shape(1), block.rows, block.drafts);
  expect_shape("temperatures", temperatures.size(), 1, block.rows, 1);
  expect_shape("tokens", tokens.shape(0), tokens.shape(1), block.rows, block.drafts);
  expect_shape("margins", margins.shape(0), margins.shape(1), block.rows, block.drafts);
  for (int64_t b = 0; b < block.rows; b++)
    if (temperatures.data()[b] > 0 && !(ids && logits))
      throw std::invalid_argument("sampled rows need arrays for ids and logits");
  if (ids) expect_shape("ids", ids->shape(0), ids->shape(1), count, spec.shortlist);
  if (logits) expect_shape("logits", logits->shape(0), logits->shape(1), count, spec.shortlist);
  block.base = base.data();
  block.mixed = mixed ? mixed->data() : nullptr;
  block.anchors = anchors.data();
  block.keys = keys.data();
  block.temperatures = temperatures.data();
  block.tokens = tokens.data();
  block.margins = margins.data();
  block.ids = ids && logits ? ids->data() : nullptr;
  block.logits = ids && logits ? logits->data() : nullptr;
  nb::gil_scoped_release released;
  head.draft(block);
}

using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A step's laws as Python hands them over.
struct LawArrays {
  const std::optional<Rows>& logits;
  const std::optional<IntRows>& ids;
  const std::optional<Vector>& divisors;
  const std::optional<Ints>& top_k;
  const std::optional<Doubles>&top_p, &min_p;

  Laws checked() const {
    Laws laws;
    laws.logits = logits->data();
    laws.places = logits->shape(0);
    laws.width = logits->shape(1);
    if (!laws.width) throw std::invalid_argument("a law needs at least one token");
    if (ids) expect_shape("ids", ids->shape(0), ids->shape(1), laws.places, laws.width);
    if (divisors) expect_choices(*logits, divisors->size());
    if (top_k && !(top_p && min_p && !ids)) throw std::invalid_argument("limits are three, and not of listed tokens");
    if (top_k) {
      expect_choices(*logits, top_k->size());
      expect_choices(*logits, top_p->size());
      expect_choices(*logits, min_p->size());
      laws.top_k = top_k->data();
      laws.top_p = top_p->data();
      laws.min_p = min_p->data();
    }
    laws.ids = ids ? ids->data() : nullptr;
    laws.divisors = divisors ? divisors->data() : nullptr;
    return laws;
  }
};

void verdict_of(const std::optional<Rows>& logits, const std::optional<IntRows>& ids,
                const std::optional<Vector>& divisors, const std::optional<Ints>& top_k,
                const std::optional<Doubles>& top_p, const std::optional<Doubles>& min_p,
                const std::optional<Rows>& draft_logits, const std::optional<IntRows>& draft_ids,
                const std::optional<Vector>& draft_divisors, const std::optional<Ints>& draft_top_k,
                const std::optional<Doubles>& draft_top_p, const std::optional<Doubles>& draft_min_p,
                const IntRows& control, const IntRows& tokens, uint64_t accept, uint64_t own, uint64_t keys,
                const IntRowsOut& out) {
  if (!logits) throw std::invalid_argument("the target's logits are missing");
  VerdictTask task;
  task.target = LawArrays{logits, ids, divisors, top_k, top_p, min_p}.checked();
  Laws drafter;
  if (draft_logits) {
    drafter = LawArrays{draft_logits, draft_ids, draft_divisors, draft_top_k, draft_top_p, draft_min_p}.checked();
    task.drafter = &drafter;
  }
  task.rows = tokens.shape(0);
  task.drafts = tokens.shape(1);
  expect_shape("control", control.shape(0), control.shape(1), task.rows, kVerdictColumns);
  expect_shape("out", out.shape(0), out.shape(1), task.rows, task.drafts + 2);
  task.control = reinterpret_cast<const VerdictRow*>(control.data());
  task.tokens = tokens.data();
  for (int64_t b = 0; b < task.rows; b++) {
    const VerdictRow& row = task.control[b];
    const bool drafted = !task.drafter || row.keep == 0 ||
                         (row.drafted >= 0 && row.drafted + row.keep <= drafter.places);
    if (row.keep < 0 || row.keep > task.drafts || row.start < 0 || row.start + row.keep >= task.target.places || !drafted)
      throw std::invalid_argument("row " + std::to_string(b) + " keeps more drafts than there are, or than have laws");
    if (row.rule < 0 || row.rule > static_cast<int64_t>(Rule::block))
      throw std::invalid_argument("no such rule: " + std::to_string(row.rule));
  }
  task.purposes = {accept, own, keys};
  task.out = out.data();
  nb::gil_scoped_release released;
  verdict(task);
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> kept(const Vector& logits, int64_t top_k, double top_p, double min_p) {
  if (!logits.size() || top_k < 1) throw std::invalid_argument("a law needs at least one token, and keeps at least one");
  if (damaged(logits.data(), static_cast<int64_t>(logits.size())))
    throw std::invalid_argument("logits must be numbers, got NaN or inf; the weights or the input are damaged");
  auto columns = std::make_unique<std::vector<int64_t>>();
  {
    nb::gil_scoped_release released;
    const Kernels& kernels = find_kernels();
    const auto size = static_cast<int64_t>(logits.size());
    *columns = columns_to(kernels, logits.data(), size, last_kept(kernels, logits.data(), size, {top_k, top_p, min_p}));
  }
  int64_t* data = columns->data();
  const size_t size = columns->size();
  nb::capsule owner(columns.release(), [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  return {data, {size}, owner};
}

double read_bandwidth(size_t bytes, int repeats) {
  constexpr size_t piece = size_t{1} << 20;
  Region region(bytes);
  std::memset(region.data(), 1, bytes);
  const auto pool = shared_pool();
  const Kernels& table = find_kernels();
  double best = 0.0;
  std::atomic<double> sink{0.0};  // keeps the loads alive
  nb::gil_scoped_release released;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool->run([&](int thread) {
      pool->deal(thread, static_cast<int64_t>((bytes + piece - 1) / piece), [&](int64_t p) {
        const size_t first = static_cast<size_t>(p) * piece;
        sink.store(table.read_sum(region.data() + first, std::min(piece, bytes - first)), std::memory_order_relaxed);
      });
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return best;
}

nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>> lengths(const std::shared_ptr<Cache>& cache) {
  return nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>>(cache->lengths().data(), {cache->lengths().size()},
                                                        nb::cast(cache));
}

using Bytes = nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>>;

std::vector<Bytes> packed(const std::shared_ptr<Stack>& stack) {
  const Arena& arena = stack->packed();
  std::vector<Bytes> regions;
  for (size_t i = 0; i < arena.regions(); i++)
    regions.emplace_back(arena.data(i), std::initializer_list<size_t>{arena.used(i)}, nb::cast(stack));
  return regions;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);
  nb::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("i8", DType::i8).value("i4", DType::i4);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("gelu", Activation::gelu);
  nb::class_<RopeSpec>(m, "RopeSpec")
      .def(nb::init<>())
      .def_rw("inverse_frequencies", &RopeSpec::inverse_frequencies)
      .def_rw("scale", &RopeSpec::scale);
  nb::class_<LayerSpec>(m, "LayerSpec")
      .def(nb::init<>())
      .def_rw("heads", &LayerSpec::heads)
      .def_rw("kv_heads", &LayerSpec::kv_heads)
      .def_rw("head_dim", &LayerSpec::head_dim)
      .def_rw("intermediate", &LayerSpec::intermediate)
      .def_rw("rope", &LayerSpec::rope)
      .def_rw("window", &LayerSpec::window)
      .def_rw("attention_scale", &LayerSpec::attention_scale)
      .def_rw("qk_norm", &LayerSpec::qk_norm)
      .def_rw("v_norm", &LayerSpec::v_norm)
      .def_rw("value_is_key", &LayerSpec::value_is_key)
      .def_rw("scalar", &LayerSpec::scalar);
  nb::class_<StackSpec>(m, "StackSpec")
      .def(nb::init<>())
      .def_rw("dtype", &StackSpec::dtype)
      .def_rw("isa", &StackSpec::isa)
      .def_rw("hidden", &StackSpec::hidden)
      .def_rw("input_width", &StackSpec::input_width)
      .def_rw("embeddings", &StackSpec::embeddings)
      .def_rw("vocabulary", &StackSpec::vocabulary)
      .def_rw("eps", &StackSpec::eps)
      .def_rw("embedding_scale", &StackSpec::embedding_scale)
      .def_rw("softcap", &StackSpec::softcap)
      .def_rw("activation", &StackSpec::activation)
      .def_rw("sandwich", &StackSpec::sandwich)
      .def_rw("bias", &StackSpec::bias)
      .def_rw("ropes", &StackSpec::ropes)
      .def_rw("layers", &StackSpec::layers);
  nb::class_<Cache>(m, "Cache")
      .def_prop_ro("slots", &Cache::slots)
      .def_prop_ro("capacity", &Cache::capacity)
      .def_prop_ro("dtype", &Cache::dtype)
      .def("rewind",
           [](Cache& cache, const Ints& slots, const Ints& lengths) {
             if (slots.size() != lengths.size()) throw std::invalid_argument("rewind needs one length for each slot");
             for (size_t b = 0; b < slots.size(); b++) {
               int64_t& held = cache.lengths().at(slots.data()[b]);
               if (lengths.data()[b] < 0 || lengths.data()[b] > held)
                 throw std::invalid_argument("cannot rewind a slot of " + std::to_string(held) + " tokens to " +
                                             std::to_string(lengths.data()[b]));
               held = lengths.data()[b];
             }
           },
           "slots"_a.noconvert(), "lengths"_a.noconvert())
      .def("set_open", [](Cache& cache, int slot, bool open) {
        cache.opened().at(slot) = open;
        cache.lengths().at(slot) = 0;
      });
  m.def("lengths", &lengths, "A tensor that shares memory with the cache's lengths.");
  nb::class_<Stack>(m, "Stack")
      .def(nb::init<StackSpec>())
      .def_prop_ro("isa", [](const Stack& stack) { return std::string(stack.kernels().name); })
      .def_prop_ro("weight_bytes", &Stack::weight_bytes)
      .def_prop_ro("packed", &packed, "All packed weights, norms aside, as tensors that share memory with the stack.")
      .def("set_norm", [](Stack& stack, int layer, const std::string& name,
                          const Vector& gain) { stack.set_norm(layer, name, gain.data(), gain.size()); })
      .def("set_linear",
           [](Stack& stack, int layer, const std::string& name, const Rows& weight, const std::optional<Vector>& bias) {
             if (bias && bias->size() != weight.shape(0))
               throw std::invalid_argument("layers." + std::to_string(layer) + "." + name + ".bias has " +
                                           std::to_string(bias->size()) + " values, expected " +
                                           std::to_string(weight.shape(0)));
             stack.set_linear(layer, name, weight.data(), weight.shape(0), weight.shape(1), bias ? bias->data() : nullptr);
           },
           "layer"_a, "name"_a, "weight"_a, "bias"_a = nb::none())
      .def("set_embedding", [](Stack& stack, const Rows& weight) {
        stack.set_embedding(weight.data(), weight.shape(0), weight.shape(1));
      })
      .def("set_head",
           [](Stack& stack, const Rows& weight) { stack.set_head(weight.data(), weight.shape(0), weight.shape(1)); })
      .def("new_cache", &Stack::new_cache)
      .def("forward", &forward, "cache"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "offsets"_a.noconvert(), "causal"_a, "taps"_a, "hidden"_a.noconvert().none(),
           "residual"_a.noconvert().none(), "logits_at"_a.noconvert().none(), "hidden_out"_a.noconvert(),
           "logits"_a.noconvert().none(), "features"_a.noconvert().none())
      .def("chain",
           [](Stack& stack, Cache& cache, const Ints& tokens, const Ints& positions, const Ints& slots,
              const Ints& offsets, const IntRows& keys, const Vector& temperatures, const IntRowsOut& drawn,
              const RowsOut& logits) {
             if (!stack.spec().vocabulary || stack.spec().input_width)
               throw std::invalid_argument("only a stack with an embedding and a head of its own can draft in a chain");
             const Batch batch = batch_of(tokens, positions, slots, offsets);
             const int64_t steps = keys.shape(1);
             for (int64_t b = 0; b < batch.rows; b++)
               if (batch.offsets[b + 1] <= batch.offsets[b]) throw std::invalid_argument("a row of a chain has no token");
             expect_shape("keys", keys.shape(0), steps, batch.rows, steps);
             expect_shape("temperatures", temperatures.size(), 1, batch.rows, 1);
             expect_shape("drawn", drawn.shape(0), drawn.shape(1), batch.rows, steps);
             expect_shape("logits", logits.shape(0), logits.shape(1), batch.rows * steps, stack.spec().vocabulary);
             nb::gil_scoped_release released;
             chain(stack, cache, batch, steps, keys.data(), temperatures.data(), drawn.data(), logits.data());
           },
           "cache"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "offsets"_a.noconvert(), "keys"_a.noconvert(), "temperatures"_a.noconvert(), "drawn"_a.noconvert(),
           "logits"_a.noconvert())
      .def("project",
           [](Stack& stack, Cache& cache, const Ints& tokens, const Ints& positions, const Ints& slots,
              const Ints& offsets, const Rows& hidden) {
             const Batch batch = batch_of(tokens, positions, slots, offsets);
             expect_rows("hidden", hidden, batch.count, stack.spec().hidden);
             if (stack.spec().input_width)
               throw std::invalid_argument("a stack with an input width cannot project hidden states");
             nb::gil_scoped_release released;
             stack.project(batch, cache, hidden.data());
           },
           "cache"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "offsets"_a.noconvert(), "hidden"_a.noconvert())
      .def("embed",
           [](Stack& stack, const Ints& tokens, const RowsOut& out) {
             expect_shape("out", out.shape(0), out.shape(1), tokens.size(), stack.spec().hidden);
             nb::gil_scoped_release released;
             stack.embed(tokens.data(), tokens.size(), out.data());
           },
           "tokens"_a.noconvert(), "out"_a.noconvert())
      .def("unembed",
           [](Stack& stack, const Rows& hidden, const RowsOut& logits) {
             if (!stack.spec().vocabulary) throw std::invalid_argument("this stack has no head");
             expect_rows("hidden", hidden, hidden.shape(0), stack.spec().hidden);
             expect_shape("logits", logits.shape(0), logits.shape(1), hidden.shape(0), stack.spec().vocabulary);
             nb::gil_scoped_release released;
             stack.unembed(hidden.data(), hidden.shape(0), logits.data());
           },
           "hidden"_a.noconvert(), "logits"_a.noconvert());
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
      .def("draft", &markov_draft, "base"_a.noconvert(), "mixed"_a.noconvert().none(), "anchors"_a.noconvert(),
           "keys"_a.noconvert(), "temperatures"_a.noconvert(), "tokens"_a.noconvert(), "margins"_a.noconvert(),
           "ids"_a.noconvert().none(), "logits"_a.noconvert().none());
  m.def("argmax",
        [](const Rows& logits, const IntsOut& out) {
          expect_choices(logits, out.size());
          nb::gil_scoped_release released;
          argmax(logits.data(), logits.shape(0), logits.shape(1), out.data());
        },
        "logits"_a.noconvert(), "out"_a.noconvert(), "Where each row's largest entry first stands.");
  m.def("gumbel_argmax",
        [](const Rows& logits, const Ints& keys, const IntsOut& out, const std::optional<Vector>& divisors,
           const std::optional<IntRows>& ids) {
          expect_choices(logits, out.size());
          expect_choices(logits, keys.size());
          if (divisors) expect_choices(logits, divisors->size());
          if (ids) expect_shape("ids", ids->shape(0), ids->shape(1), logits.shape(0), logits.shape(1));
          nb::gil_scoped_release released;
          gumbel_argmax(logits.data(), logits.shape(0), logits.shape(1), keys.data(),
                        divisors ? divisors->data() : nullptr, ids ? ids->data() : nullptr, out.data());
        },
        "logits"_a.noconvert(), "keys"_a.noconvert(), "out"_a.noconvert(), "divisors"_a.noconvert() = nb::none(),
        "ids"_a.noconvert() = nb::none(),
        "The column of each row's largest logit / divisor + Gumbel value, exactly as outrider.noise defines it.");
  m.def("verdict", &verdict_of, "logits"_a.noconvert(), "ids"_a.noconvert().none(), "divisors"_a.noconvert().none(),
        "top_k"_a.noconvert().none(), "top_p"_a.noconvert().none(), "min_p"_a.noconvert().none(),
        "draft_logits"_a.noconvert().none(), "draft_ids"_a.noconvert().none(), "draft_divisors"_a.noconvert().none(),
        "draft_top_k"_a.noconvert().none(), "draft_top_p"_a.noconvert().none(), "draft_min_p"_a.noconvert().none(),
        "control"_a.noconvert(), "tokens"_a.noconvert(), "accept"_a, "own"_a, "keys"_a, "out"_a.noconvert(),
        "Verifies a step's drafts: outrider.acceptance says what is what.");
  m.def("kept", &kept, "logits"_a.noconvert(), "top_k"_a, "top_p"_a, "min_p"_a,
        "The columns that top-k, top-p and min-p leave of one row of logits, ascending.");
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "repeats"_a = 3,
        "Best bytes per second of `repeats` sweeps by all threads over fresh memory.");
  m.def("threads", [] { return shared_pool()->threads(); });
  m.def("set_threads", [](int threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be between 1 and 1024");
    nb::gil_scoped_release released;
    set_threads(threads);
  });
  m.def("instruction_sets", &usable_kernels, "Those this build has and this processor runs, best first.");
}

}  // namespace outrider
