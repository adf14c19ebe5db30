// Python bindings: scheduling a step and learning from it.
#include <algorithm>
#include <string>
#include <tuple>

#include "acceptance.hpp"
#include "bindings.hpp"
#include "prefix_search.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

using DoubleMatrix = Array<const double, 2>;
using Past = std::tuple<DoubleMatrix, int64_t>;

int64_t schedule_rows(const std::optional<FloatMatrix>& confidence, const IntVector& lengths,
                      const DoubleMatrix& positions, const DoubleVector& row_shift, const DoubleVector& seconds,
                      double spent, int64_t search, const std::optional<Past>& past, bool one_each,
                      const IntMatrixOut& rows, const Array<double, 3>& chances, const IntVectorOut& keep) {
  ScheduleTask task;
  task.batch = rows.shape(0);
  task.drafts = chances.shape(2);
  if (static_cast<int64_t>(lengths.size()) < task.batch || keep.size() != lengths.size())
    throw std::invalid_argument("lengths and keep need a number for each row");
  if (confidence) expect_matrix("confidence", *confidence, lengths.size(), task.drafts);
  expect_matrix("rows", rows, task.batch, kScheduledColumns);
  if (chances.shape(0) != 3) throw std::invalid_argument("chances are logits, probabilities and survivals");
  expect_shape("chances", chances.shape(1), chances.shape(2), task.batch, task.drafts);
  if (positions.shape(0) < 2 || static_cast<int64_t>(positions.shape(1)) < task.drafts)
    throw std::invalid_argument("positions need a slope and a shift for each draft");
  if (static_cast<int64_t>(seconds.size()) <= task.batch * task.drafts)
    throw std::invalid_argument("seconds are too few: expected one number for each number of drafts");
  if (search < 0 || search > static_cast<int64_t>(Search::lagged))
    throw std::invalid_argument("no such search: " + std::to_string(search));
  task.rows = reinterpret_cast<ScheduledRow*>(rows.data());
  for (int64_t b = 0; b < task.batch; b++) {
    const int64_t slot = task.rows[b].slot, length = lengths.data()[b];
    if (slot < 0 || slot >= static_cast<int64_t>(row_shift.size()))
      throw std::invalid_argument("slot " + std::to_string(slot) + " has no correction");
    if (length < 0 || length > task.drafts)
      throw std::invalid_argument("row " + std::to_string(b) + " has " + std::to_string(length) +
                                  " drafts, expected 0 to " + std::to_string(task.drafts));
  }
  task.confidence = data_or_null(confidence);
  task.lengths = lengths.data();
  task.slope = positions.data();
  task.shift = positions.data() + positions.shape(1);
  task.row_shift = row_shift.data();
  task.seconds = seconds.data();
  task.spent = spent;
  task.search = static_cast<Search>(search);
  if (past) {
    const auto& [survival, batch] = *past;
    task.past = survival.data();
    task.past_rows = survival.shape(0);
    task.past_drafts = survival.shape(1);
    task.past_batch = batch;
    if (!survival.size() || batch < 1) throw std::invalid_argument("the past needs at least one row");
  }
  task.one_each = one_each;
  task.logits = chances.data();
  task.adjusted = task.logits + task.batch * task.drafts;
  task.survival = task.adjusted + task.batch * task.drafts;
  task.keep = keep.data();
  return schedule(task);  // with the GIL: giving it back and forth takes longer than scheduling a few rows
}

// Parts of larger arrays: columns, and rows whose numbers lie side by side.
using Column = nb::ndarray<const int64_t, nb::ndim<1>, nb::device::cpu>;
using Part = nb::ndarray<const double, nb::ndim<2>, nb::device::cpu>;

IntColumn column(const char* name, const Column& array, size_t rows) {
  if (array.shape(0) != rows) throw std::invalid_argument(std::string(name) + " needs a number for each round");
  return {array.data(), array.stride(0)};
}

DoubleRows part(const char* name, const Part& array, size_t rows, size_t width) {
  expect_matrix(name, array, static_cast<int64_t>(rows), static_cast<int64_t>(width));
  if (array.shape(1) > 1 && array.stride(1) != 1)
    throw std::invalid_argument(std::string(name) + " needs each row's numbers side by side");
  return {array.data(), array.stride(0)};
}

void expect_slots(const IntColumn& slots, int64_t rounds, size_t all) {
  for (int64_t i = 0; i < rounds; i++)
    if (slots[i] < 0 || slots[i] >= static_cast<int64_t>(all))
      throw std::invalid_argument("slot " + std::to_string(slots[i]) + " is not known");
}

void learn_acceptance(const Part& logits, const Part& adjusted, const Column& slots, const Column& verified,
                      const Column& accepted, const Array<double, 2>& positions, const Array<double, 1>& row_shift,
                      const Array<double, 1>& row_curvature) {
  const size_t rounds = logits.shape(0), drafts = logits.shape(1);
  if (positions.shape(0) != 4 || positions.shape(1) < drafts || row_curvature.size() != row_shift.size())
    throw std::invalid_argument("positions and rows do not fit the drafts");
  const IntColumn slot_of = column("slots", slots, rounds);
  expect_slots(slot_of, static_cast<int64_t>(rounds), row_shift.size());
  update_acceptance({static_cast<int64_t>(rounds), static_cast<int64_t>(drafts), part("logits", logits, rounds, drafts),
                     part("adjusted", adjusted, rounds, drafts), slot_of, column("verified", verified, rounds),
                     column("accepted", accepted, rounds), positions.data(),
                     static_cast<int64_t>(positions.shape(1)), row_shift.data(), row_curvature.data(),
                     static_cast<int64_t>(row_shift.size())});
}

int64_t learn_survivals(const Column& slots, const Part& adjusted, const Part& survival, const Column& lengths,
                        const Column& limits, const Array<double, 3>& rows, const Array<int64_t, 1>& counts,
                        const Array<double, 2>& shared, int64_t shared_count, const Array<double, 1>& conditional,
                        const Array<int64_t, 1>& reached) {
  const size_t rounds = survival.shape(0), width = survival.shape(1), drafts = conditional.size();
  if (rows.shape(0) != counts.size() || rows.shape(2) != drafts || shared.shape(1) != drafts ||
      reached.size() != drafts || !rows.shape(1) || !shared.shape(0) || !width)
    throw std::invalid_argument("the history's arrays do not fit each other");
  const IntColumn slot_of = column("slots", slots, rounds);
  expect_slots(slot_of, static_cast<int64_t>(rounds), counts.size());
  return add_to_history({static_cast<int64_t>(rounds), static_cast<int64_t>(std::min(width, drafts)),
                         part("adjusted", adjusted, rounds, width), part("survival", survival, rounds, width), slot_of,
                         column("lengths", lengths, rounds), column("limits", limits, rounds),
                         static_cast<int64_t>(drafts), static_cast<int64_t>(rows.shape(1)),
                         static_cast<int64_t>(shared.shape(0)), rows.data(), counts.data(), shared.data(), shared_count,
                         conditional.data(), reached.data()});
}

}  // namespace

void bind_scheduling(nb::module_& m) {
  m.def("schedule", &schedule_rows, "confidence"_a.noconvert().none(), "lengths"_a.noconvert(),
        "positions"_a.noconvert(), "row_shift"_a.noconvert(), "seconds"_a.noconvert(), "spent"_a, "search"_a,
        "past"_a.none(), "one_each"_a, "rows"_a.noconvert(), "chances"_a.noconvert(), "keep"_a.noconvert(),
        "What outrider.scheduling.schedule.schedule does in numpy; returns how many rows have drafts.\n\n"
        "confidence float32 [>= B, K] or None. lengths int64 [>= B]. positions float64 [>= 2, >= K]: slopes, shifts.\n"
        "row_shift float64 [slots]. seconds float64 [> B * K]. search: 0 early, 1 global, 2 lagged. past: survivals\n"
        "float64 [D, K] and how many rows their step had, or None. rows int64 [B, 6], with slots and limits.\n"
        "chances float64 [3, B, K]. keep int64 [>= B], zeros.");
  m.def("learn_acceptance", &learn_acceptance, "logits"_a.noconvert(), "adjusted"_a.noconvert(), "slots"_a.noconvert(),
        "verified"_a.noconvert(), "accepted"_a.noconvert(), "positions"_a.noconvert(), "row_shift"_a.noconvert(),
        "row_curvature"_a.noconvert(), "outrider.scheduling.acceptance.AcceptanceModel.update, in place.");
  m.def("learn_survivals", &learn_survivals, "slots"_a.noconvert(), "adjusted"_a.noconvert(), "survival"_a.noconvert(),
        "lengths"_a.noconvert(), "limits"_a.noconvert(), "rows"_a.noconvert(), "counts"_a.noconvert(),
        "shared"_a.noconvert(), "shared_count"_a, "conditional"_a.noconvert(), "reached"_a.noconvert(),
        "outrider.scheduling.acceptance.SurvivalHistory.add, in place; returns how many rounds were shared so far.");
}

}  // namespace outrider
