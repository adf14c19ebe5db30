// Python bindings: argmax, Gumbel-max sampling, truncation and verification.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "confidence.hpp"
#include "sampler.hpp"
#include "splitmix.hpp"
#include "verification.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

// Distributions as Python passes them: logits [R, W], then ids [R, W], temperatures, top_k, top_p and min_p [R], each
// of the latter or None. A tuple, because this is called in every step and an object of a bound class would cost more.
using DistributionArrays =
    std::tuple<FloatMatrix, std::optional<IntMatrix>, std::optional<FloatVector>, std::optional<IntVector>,
               std::optional<DoubleVector>, std::optional<DoubleVector>>;
using ControlWords = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, uint64_t, uint64_t>;  // of VerificationRow
using Verified = std::pair<std::vector<int64_t>, std::vector<std::vector<int64_t>>>;  // accepted [B], tokens [B, K + 1]
using PurposeWords = std::tuple<uint64_t, uint64_t, uint64_t>;  // the fields of Purposes

void expect_one_per_row(const FloatMatrix& logits, size_t count) {
  if (!logits.shape(1)) throw std::invalid_argument("logits need at least one column");
  expect_shape("an argument with one value per row of logits", count, 1, logits.shape(0), 1);
}

DistributionRows checked(const DistributionArrays& arrays) {
  const auto& [logits, ids, temperatures, top_k, top_p, min_p] = arrays;
  DistributionRows rows;
  rows.logits = logits.data();
  rows.rows = logits.shape(0);
  rows.width = logits.shape(1);
  if (!rows.width) throw std::invalid_argument("a distribution needs at least one token");
  if (ids) expect_matrix("ids", *ids, rows.rows, rows.width);
  if (temperatures) expect_one_per_row(logits, temperatures->size());
  if (top_k) {
    if (!top_p || !min_p || ids)
      throw std::invalid_argument("top_k, top_p and min_p go together, and only with all tokens (no ids)");
    expect_one_per_row(logits, top_k->size());
    expect_one_per_row(logits, top_p->size());
    expect_one_per_row(logits, min_p->size());
    rows.top_k = top_k->data();
    rows.top_p = top_p->data();
    rows.min_p = min_p->data();
  }
  rows.ids = data_or_null(ids);
  rows.temperatures = data_or_null(temperatures);
  return rows;
}

void expect_within(const VerificationTask& task) {
  for (int64_t b = 0; b < task.rows; b++) {
    const VerificationRow& row = task.control[b];
    const bool drafter_fits = !task.drafter || row.keep == 0 ||
                              (row.drafter_row >= 0 && row.drafter_row + row.keep <= task.drafter->rows);
    if (row.keep < 0 || row.keep > task.drafts || row.target_row < 0 || row.target_row + row.keep >= task.target.rows ||
        !drafter_fits)
      throw std::invalid_argument("row " + std::to_string(b) +
                                  " keeps more drafts than there are, or than have distributions");
    if (row.rule < 0 || row.rule > static_cast<int64_t>(Rule::block))
      throw std::invalid_argument("no such rule: " + std::to_string(row.rule));
  }
}

Verified verify_arrays(const DistributionArrays& target, const std::optional<DistributionArrays>& drafter,
                   const std::vector<ControlWords>& control, const IntMatrix& tokens, const PurposeWords& purposes) {
  VerificationTask task;
  task.target = checked(target);
  DistributionRows drafter_rows;
  if (drafter) {
    drafter_rows = checked(*drafter);
    task.drafter = &drafter_rows;
  }
  task.rows = tokens.shape(0);
  task.drafts = tokens.shape(1);
  expect_shape("control", control.size(), 1, task.rows, 1);
  std::vector<VerificationRow> rows;
  for (const auto& [target_row, drafter_row, keep, rule, position, seed, round] : control)
    rows.push_back({target_row, drafter_row, keep, rule, position, static_cast<int64_t>(seed),
                    static_cast<int64_t>(round)});
  std::vector<int64_t> out(task.rows * (task.drafts + 2));
  task.control = rows.data();
  task.tokens = tokens.data();
  task.purposes = {std::get<0>(purposes), std::get<1>(purposes), std::get<2>(purposes)};
  task.out = out.data();
  expect_within(task);
  {
    nb::gil_scoped_release released;
    verify(task);
  }
  Verified result;
  for (auto row = out.cbegin(); row != out.cend(); row += task.drafts + 2) {
    result.first.push_back(*row);
    result.second.emplace_back(row + 1, row + task.drafts + 2);
  }
  return result;
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> truncate(const FloatVector& logits, int64_t top_k, double top_p,
                                                      double min_p) {
  const auto size = static_cast<int64_t>(logits.size());
  if (!size || top_k < 1) throw std::invalid_argument("truncation needs at least one token, and keeps at least one");
  if (has_nan_or_inf(logits.data(), size))
    throw std::invalid_argument("logits must be numbers, got NaN or inf; the weights or the input are damaged");
  auto columns = std::make_unique<std::vector<int64_t>>();
  {
    nb::gil_scoped_release released;
    const Kernels& kernels = find_kernels();
    const Candidate last = last_kept(kernels, logits.data(), size, {top_k, top_p, min_p});
    *columns = kept_columns(kernels, logits.data(), size, last);
  }
  int64_t* data = columns->data();
  const size_t count = columns->size();
  nb::capsule owner(columns.release(), [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  return {data, {count}, owner};
}

void argmax_rows(const FloatMatrix& logits, const IntVectorOut& out) {
  expect_one_per_row(logits, out.size());
  nb::gil_scoped_release released;
  argmax(logits.data(), logits.shape(0), logits.shape(1), out.data());
}

void gumbel_argmax_rows(const FloatMatrix& logits, const IntVector& keys, const IntVectorOut& out,
                        const std::optional<FloatVector>& temperatures, const std::optional<IntMatrix>& ids) {
  expect_one_per_row(logits, out.size());
  expect_one_per_row(logits, keys.size());
  if (temperatures) expect_one_per_row(logits, temperatures->size());
  if (ids) expect_matrix("ids", *ids, logits.shape(0), logits.shape(1));
  nb::gil_scoped_release released;
  gumbel_argmax(logits.data(), logits.shape(0), logits.shape(1), keys.data(), data_or_null(temperatures),
                data_or_null(ids), out.data());
}

// The words of (row, position) pairs from each row's stream, as outrider.sampling.rng absorbs positions.
void absorb_positions(const Array<const uint64_t, 1>& streams, const IntVector& rows, const IntVector& positions,
                      const Array<uint64_t, 1>& out) {
  expect_shape("positions", positions.size(), 1, rows.size(), 1);
  expect_shape("out", out.size(), 1, rows.size(), 1);
  for (size_t i = 0; i < rows.size(); i++) {
    const int64_t row = rows.data()[i];
    if (row < 0 || row >= static_cast<int64_t>(streams.size()))
      throw std::invalid_argument("row " + std::to_string(row) + " has no stream");
    out.data()[i] = absorb(streams.data()[row], static_cast<uint64_t>(positions.data()[i]));
  }
}

// The keys of the positions after each start, from the words of each row's seed, round and purpose.
std::vector<std::vector<int64_t>> token_keys(const std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>& rows,
                                             const std::vector<int64_t>& starts, int64_t count) {
  expect_shape("starts", starts.size(), 1, rows.size(), 1);
  std::vector<std::vector<int64_t>> keys(rows.size());
  for (size_t i = 0; i < rows.size(); i++) {
    const auto& [seed, round, purpose] = rows[i];
    const uint64_t stream = absorb(absorb(seed, round), purpose);
    for (int64_t k = 0; k < count; k++)
      keys[i].push_back(static_cast<int64_t>(absorb(stream, static_cast<uint64_t>(starts[i] + k))));
  }
  return keys;
}

void scale_confidence(const FloatMatrix& confidence, const Scalings& scalings, const FloatMatrixOut& out) {
  const int64_t rows = confidence.shape(0), width = confidence.shape(1);
  expect_shape("scalings", scalings.size(), 1, rows, 1);
  expect_matrix("out", out, rows, width);
  for (int64_t b = 0; b < rows; b++) {
    float* to = out.data() + b * width;
    std::copy_n(confidence.data() + b * width, width, to);
    if (scalings[b]) scale_confidences(*scalings[b], to, width);
  }
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("absorb_positions", &absorb_positions, "streams"_a.noconvert(), "rows"_a.noconvert(),
        "positions"_a.noconvert(), "out"_a.noconvert(), "Words of (row, position) pairs: see outrider.sampling.rng.");
  m.def("token_keys", &token_keys, "rows"_a, "starts"_a, "count"_a,
        "Token keys of `count` positions from each start on, a list for each row: see outrider.sampling.rng. rows: the\n"
        "words of each row's seed, round and purpose.");
  m.def("scale_confidence", &scale_confidence, "confidence"_a.noconvert(), "scalings"_a, "out"_a.noconvert(),
        "sigmoid(logit(confidence) / temperature + shift), element by element. scalings: each row's temperatures and\n"
        "shifts, the last of them for all later positions, and the largest logit; None leaves the row as it is.");
  m.def("argmax", &argmax_rows, "logits"_a.noconvert(), "out"_a.noconvert(),
        "The column of each row's largest logit, the lowest on ties.");
  m.def("gumbel_argmax", &gumbel_argmax_rows, "logits"_a.noconvert(), "keys"_a.noconvert(), "out"_a.noconvert(),
        "temperatures"_a.noconvert() = nb::none(), "ids"_a.noconvert() = nb::none(),
        "The column of each row's largest logit / temperature + Gumbel value, exactly as outrider.sampling.rng defines it.");
  m.def("truncate", &truncate, "logits"_a.noconvert(), "top_k"_a, "top_p"_a, "min_p"_a,
        "The columns that top-k, top-p and min-p keep of one row of logits, ascending.");
  m.def("verify", &verify_arrays, "target"_a.noconvert(), "drafter"_a.noconvert().none(), "control"_a,
        "tokens"_a.noconvert(), "purposes"_a,
        "Verify a step's drafts by the rules of outrider.sampling.verification.\n\n"
        "target, drafter (or None: deterministic drafts): tuples (logits float32 [R, W], ids int64 [R, W],\n"
        "temperatures float32 [R], top_k int64 [R], top_p float64 [R], min_p float64 [R]), each but the logits may be None.\n"
        "control: for each row a tuple of target row, drafter row, keep, rule (0 coupled, 1 rejection, 2 block), position, seed,\n"
        "round. tokens int64 [B, K]. purposes: the words for accept, next token and Gumbel keys. Returns the numbers of\n"
        "accepted drafts [B], and [B, K + 1] the drafts with the recovered or bonus token behind the accepted ones.");
}

}  // namespace outrider
