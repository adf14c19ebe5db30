// Python bindings: layer stacks and their KV caches.
#include <nanobind/stl/variant.h>

#include <memory>
#include <variant>
#include <vector>

#include "bindings.hpp"
#include "draft_loop.hpp"
#include "stack.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

// From Python's lists of integers: right after a pass a list is read in less time than an array is made.
using IntList = std::vector<int64_t>;

Batch batch_of(const IntList& tokens, const IntList& positions, const IntList& slots, const IntList& offsets) {
  if (positions.size() != tokens.size() || offsets.size() != slots.size() + 1)
    throw std::invalid_argument("a batch needs as many positions as tokens, and one more offset than slots");
  return {tokens.data(), positions.data(), slots.data(), offsets.data(), static_cast<int64_t>(slots.size()),
          static_cast<int64_t>(tokens.size())};
}

// ------------------------------------------------------------------------------------------------ passes

void forward(Stack& stack, KVCache& cache, const IntList& tokens, const IntList& positions, const IntList& slots,
             const IntList& offsets, bool causal, const std::vector<int>& aux_layers,
             const std::optional<FloatMatrix>& hidden, const std::optional<FloatMatrix>& residual,
             const std::optional<IntVector>& logits_at, const FloatMatrixOut& hidden_out,
             const std::optional<FloatMatrixOut>& logits, const std::optional<FloatMatrixOut>& features,
             const std::optional<IntVectorOut>& largest) {
  const StackSpec& spec = stack.spec();
  const Batch batch = batch_of(tokens, positions, slots, offsets);
  PassInput input;
  input.causal = causal;
  if (hidden) expect_matrix("hidden", *hidden, batch.count, spec.input_width ? spec.input_width : spec.hidden);
  if (residual) expect_matrix("residual", *residual, batch.count, spec.hidden);
  if (spec.input_width && !(hidden && residual))
    throw std::invalid_argument("a stack with an input width needs both hidden and residual");
  if (!spec.input_width && residual) throw std::invalid_argument("residual is for stacks with an input width only");
  input.hidden = data_or_null(hidden);
  input.residual = data_or_null(residual);
  PassOutput output;
  output.aux_layers = aux_layers;
  for (int layer : aux_layers)
    if (layer < -1 || layer >= static_cast<int>(spec.layers.size()))
      throw std::invalid_argument("auxiliary layer " + std::to_string(layer) + " is outside -1 .. " +
                                  std::to_string(spec.layers.size() - 1));
  if (!aux_layers.empty() && !features) throw std::invalid_argument("auxiliary layers need a features array");
  output.logits_rows = logits_at ? logits_at->size() : batch.count;
  output.logits_at = data_or_null(logits_at);
  expect_matrix("hidden_out", hidden_out, output.logits_rows, spec.hidden);
  if (logits) expect_matrix("logits", *logits, output.logits_rows, spec.vocabulary);
  if (features) expect_matrix("features", *features, batch.count, aux_layers.size() * spec.hidden);
  if (largest) expect_shape("largest", largest->size(), 1, output.logits_rows, 1);
  if (largest && !spec.vocabulary) throw std::invalid_argument("this stack has no head");
  output.hidden = hidden_out.data();
  output.logits = data_or_null(logits);
  output.features = data_or_null(features);
  output.largest = data_or_null(largest);
  nb::gil_scoped_release released;
  stack.forward(batch, cache, input, output);
}

void draft(Stack& stack, KVCache& cache, const IntList& tokens, const IntList& positions, const IntList& slots,
           const IntList& offsets, const IntMatrix& keys, const FloatVector& temperatures, const IntMatrixOut& drawn,
           const FloatMatrixOut& logits) {
  if (!stack.spec().vocabulary || stack.spec().input_width)
    throw std::invalid_argument("the draft loop needs a stack that has an embedding and a head, and no input width");
  const Batch batch = batch_of(tokens, positions, slots, offsets);
  const int64_t steps = keys.shape(1);
  for (int64_t b = 0; b < batch.rows; b++)
    if (batch.offsets[b + 1] <= batch.offsets[b])
      throw std::invalid_argument("row " + std::to_string(b) + " of the draft loop has no token");
  expect_matrix("keys", keys, batch.rows, steps);
  expect_shape("temperatures", temperatures.size(), 1, batch.rows, 1);
  expect_matrix("drawn", drawn, batch.rows, steps);
  expect_matrix("logits", logits, batch.rows * steps, stack.spec().vocabulary);
  nb::gil_scoped_release released;
  draft_loop(stack, cache, batch, steps, keys.data(), temperatures.data(), drawn.data(), logits.data());
}

void project(Stack& stack, KVCache& cache, const IntList& tokens, const IntList& positions, const IntList& slots,
             const IntList& offsets, const FloatMatrix& hidden) {
  const Batch batch = batch_of(tokens, positions, slots, offsets);
  expect_matrix("hidden", hidden, batch.count, stack.spec().hidden);
  if (stack.spec().input_width) throw std::invalid_argument("a stack with an input width cannot project hidden states");
  nb::gil_scoped_release released;
  stack.project(batch, cache, hidden.data());
}

void embed(Stack& stack, const IntVector& tokens, const FloatMatrixOut& out) {
  expect_matrix("out", out, tokens.size(), stack.spec().hidden);
  nb::gil_scoped_release released;
  stack.embed(tokens.data(), tokens.size(), out.data());
}

void unembed(Stack& stack, const FloatMatrix& hidden, const FloatMatrixOut& logits) {
  if (!stack.spec().vocabulary) throw std::invalid_argument("this stack has no head");
  expect_matrix("hidden", hidden, hidden.shape(0), stack.spec().hidden);
  expect_matrix("logits", logits, hidden.shape(0), stack.spec().vocabulary);
  nb::gil_scoped_release released;
  stack.unembed(hidden.data(), hidden.shape(0), logits.data());
}

// ------------------------------------------------------------------------------------------------ weights

// A matrix as Python gives it: float32, or the parts of a block format (format, values, scales, minima or None).
using BlockMatrix = std::tuple<DType, Array<const uint8_t, 2>, FloatMatrix, std::optional<FloatMatrix>>;
using AnyMatrix = std::variant<FloatMatrix, BlockMatrix>;

Rows rows_of(const AnyMatrix& matrix) {
  Rows rows;
  if (const FloatMatrix* weight = std::get_if<FloatMatrix>(&matrix)) {
    rows.count = weight->shape(0);
    rows.inner = weight->shape(1);
    rows.weight = weight->data();
    return rows;
  }
  const auto& [kind, values, scale, minimum] = std::get<BlockMatrix>(matrix);
  if (kind != DType::q8_0 && kind != DType::q4_0 && kind != DType::q4_1)
    throw std::invalid_argument("blocks must be of kind q8_0, q4_0 or q4_1");
  rows.count = values.shape(0);
  rows.inner = values.shape(1);
  if (rows.inner % kGroup) throw std::invalid_argument("rows of blocks must be a multiple of 32 wide");
  expect_matrix("scale", scale, rows.count, rows.inner / kGroup);
  if (minimum) expect_matrix("minimum", *minimum, rows.count, rows.inner / kGroup);
  if (kind == DType::q4_1 && !minimum) throw std::invalid_argument("blocks of kind q4_1 need a minimum");
  rows.kind = kind;
  rows.values = values.data();
  rows.scale = scale.data();
  rows.minimum = data_or_null(minimum);
  return rows;
}

void set_linear(Stack& stack, int layer, const std::string& name, const AnyMatrix& weight,
                const std::optional<FloatVector>& bias) {
  Rows rows = rows_of(weight);
  if (bias && static_cast<int64_t>(bias->size()) != rows.count)
    throw std::invalid_argument("layers." + std::to_string(layer) + "." + name + ".bias has " +
                                std::to_string(bias->size()) + " values, expected " + std::to_string(rows.count));
  rows.bias = data_or_null(bias);
  stack.set_linear(layer, name, rows);
}

using Bytes = nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>>;

std::vector<Bytes> packed(const std::shared_ptr<Stack>& stack) {
  const Arena& arena = stack->packed();
  std::vector<Bytes> regions;
  for (size_t i = 0; i < arena.regions(); i++)
    regions.emplace_back(arena.data(i), std::initializer_list<size_t>{arena.used(i)}, nb::cast(stack));
  return regions;
}

// ------------------------------------------------------------------------------------------------ cache

nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>> lengths(const std::shared_ptr<KVCache>& cache) {
  return nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>>(cache->lengths().data(), {cache->lengths().size()},
                                                        nb::cast(cache));
}

// ------------------------------------------------------------------------------------------------ specs

void bind_specs(nb::module_& m) {
  nb::enum_<DType>(m, "DType")
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("i8", DType::i8)
      .value("i4", DType::i4)
      .value("q8_0", DType::q8_0)
      .value("q4_0", DType::q4_0)
      .value("q4_1", DType::q4_1)
      .value("q8_min", DType::q8_min);
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
      .def_rw("qkv", &LayerSpec::qkv)
      .def_rw("out", &LayerSpec::out)
      .def_rw("gate_up", &LayerSpec::gate_up)
      .def_rw("down", &LayerSpec::down)
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
      .def_rw("head", &StackSpec::head)
      .def_rw("embedding", &StackSpec::embedding)
      .def_rw("tied", &StackSpec::tied)
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
}

}  // namespace

void bind_stack(nb::module_& m) {
  bind_specs(m);
  nb::class_<KVCache>(m, "KVCache")
      .def_prop_ro("slots", &KVCache::slots)
      .def_prop_ro("capacity", &KVCache::capacity)
      .def_prop_ro("dtype", &KVCache::dtype)
      .def_prop_ro("pages", &KVCache::page_count)
      .def_prop_ro("page_bytes", &KVCache::page_bytes)
      .def("set_open", &KVCache::set_open, "slot"_a, "open"_a)
      .def("set_table", &KVCache::set_table, "slot"_a, "table"_a, "fixed"_a)
      .def("copy_page", &KVCache::copy_page, "source"_a, "target"_a);
  m.attr("block_tokens") = kBlock;
  nb::exception<NoRoom>(m, "NoRoom");
  m.def("lengths", &lengths, "cache"_a, "A tensor that shares memory with the cache's lengths.");
  nb::class_<Stack>(m, "Stack")
      .def(nb::init<StackSpec>())
      .def_prop_ro("isa", [](const Stack& stack) { return std::string(stack.kernels().name); })
      .def_prop_ro("weight_bytes", &Stack::weight_bytes)
      .def_prop_ro("packed", &packed, "All packed weights except norms, as tensors that share memory with the stack.")
      .def("set_norm", [](Stack& stack, int layer, const std::string& name,
                          const FloatVector& gain) { stack.set_norm(layer, name, gain.data(), gain.size()); })
      .def("set_linear", &set_linear, "layer"_a, "name"_a, "weight"_a, "bias"_a = nb::none())
      .def("set_embedding", [](Stack& stack, const AnyMatrix& rows, int64_t first) {
        stack.set_embedding(rows_of(rows), first);
      }, "rows"_a, "first"_a = 0)
      .def("set_head", [](Stack& stack, const AnyMatrix& rows, int64_t first) {
        stack.set_head(rows_of(rows), first);
      }, "rows"_a, "first"_a = 0)
      .def("new_cache", &Stack::new_cache, "slots"_a, "capacity"_a, "pages"_a, "int8"_a = false)
      .def("forward", &forward, "cache"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "offsets"_a.noconvert(), "causal"_a, "aux_layers"_a, "hidden"_a.noconvert().none(),
           "residual"_a.noconvert().none(), "logits_at"_a.noconvert().none(), "hidden_out"_a.noconvert(),
           "logits"_a.noconvert().none(), "features"_a.noconvert().none(),
           "largest"_a.noconvert().none())
      .def("draft_loop", &draft, "cache"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "offsets"_a.noconvert(), "keys"_a.noconvert(), "temperatures"_a.noconvert(), "drawn"_a.noconvert(),
           "logits"_a.noconvert())
      .def("project", &project, "cache"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "offsets"_a.noconvert(), "hidden"_a.noconvert())
      .def("embed", &embed, "tokens"_a.noconvert(), "out"_a.noconvert())
      .def("unembed", &unembed, "hidden"_a.noconvert(), "logits"_a.noconvert());
}

}  // namespace outrider
