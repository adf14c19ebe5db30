// Python bindings: scheduling a step, planning drafts and learning from them.
#include <nanobind/stl/function.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "acceptance.hpp"
#include "bindings.hpp"
#include "prefix_search.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

using Doubles = Array<double, 1>;
using DoubleMatrix = Array<double, 2>;
using DoubleCube = Array<double, 3>;
using IntCube = Array<int64_t, 3>;
using Numbers = std::vector<int64_t>;

constexpr size_t kLearntRows = 64;  // of one call, some rows stand for all

void expect_slots(const Numbers& slots, size_t all) {
  for (const int64_t slot : slots)
    if (slot < 0 || slot >= static_cast<int64_t>(all))
      throw std::invalid_argument("slot " + std::to_string(slot) + " is not known");
}

Acceptance view(const DoubleMatrix& positions, const Doubles& row_shift, const Doubles& row_curvature) {
  if (positions.shape(0) != 4 || row_curvature.size() != row_shift.size())
    throw std::invalid_argument("positions need four rows, and rows two numbers each");
  return {positions.data(), static_cast<int64_t>(positions.shape(1)), row_shift.data(), row_curvature.data(),
          static_cast<int64_t>(row_shift.size())};
}

// outrider.scheduling.schedule.NumpyScheduler. It works on arrays that Python owns, given once and not in every call:
// right after a pass each array that crosses costs several microseconds.
class Scheduler {
 public:
  void bind(const DoubleMatrix& positions, const Doubles& row_shift, const Doubles& row_curvature,
            const DoubleCube& logits, const IntCube& sizes, const Array<int64_t, 1>& counts,
            const DoubleMatrix& shared, const IntMatrixOut& shared_sizes, const Array<int64_t, 1>& shared_count) {
    if (!rows_.empty() && static_cast<int64_t>(positions.shape(1)) != width_)
      throw std::invalid_argument("learn from the rounds so far before longer ones come");
    if (logits.shape(0) != counts.size() || sizes.shape(0) != counts.size() || sizes.shape(1) != logits.shape(1) ||
        sizes.shape(2) != 2 || shared.shape(1) != logits.shape(2) || shared_sizes.shape(0) != shared.shape(0) ||
        shared_sizes.shape(1) != 2 || shared_count.size() != 1 || !logits.shape(1) || !shared.shape(0) ||
        !logits.shape(2) || positions.shape(1) < logits.shape(2) || row_shift.size() < counts.size())
      throw std::invalid_argument("the history's arrays do not fit each other");
    model_ = view(positions, row_shift, row_curvature);
    history_ = {logits.data(), sizes.data(), counts.data(), shared.data(), shared_sizes.data(), shared_count.data(),
                static_cast<int64_t>(counts.size()), static_cast<int64_t>(logits.shape(1)),
                static_cast<int64_t>(shared.shape(0)), static_cast<int64_t>(logits.shape(2))};
    width_ = model_.known;
    arrays_ = nb::make_tuple(positions, row_shift, row_curvature, logits, sizes, counts, shared, shared_sizes,
                             shared_count);
  }

  Numbers schedule(const std::optional<FloatMatrix>& confidence, const Numbers& lengths, const Numbers& slots,
                   const Numbers& limits, const DoubleVector& seconds, double spent, int64_t search,
                   int64_t at_least) {
    ScheduleTask task;
    task.batch = static_cast<int64_t>(slots.size());
    task.drafts = confidence ? static_cast<int64_t>(confidence->shape(1))
                             : lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
    if (lengths.size() < slots.size() || limits.size() != slots.size())
      throw std::invalid_argument("lengths and limits need a number for each row");
    if (confidence) expect_matrix("confidence", *confidence, lengths.size(), task.drafts);
    if (task.drafts > model_.known)
      throw std::invalid_argument("there are corrections for " + std::to_string(model_.known) + " drafts, not " +
                                  std::to_string(task.drafts));
    if (static_cast<int64_t>(seconds.size()) <= task.batch * task.drafts)
      throw std::invalid_argument("seconds are too few: expected one number for each number of drafts");
    if (search < 0 || search > static_cast<int64_t>(Search::lagged))
      throw std::invalid_argument("no such search: " + std::to_string(search));
    expect_slots(slots, static_cast<size_t>(model_.slots));
    for (size_t b = 0; b < slots.size(); b++)
      if (lengths[b] < 0 || lengths[b] > task.drafts)
        throw std::invalid_argument("row " + std::to_string(b) + " has " + std::to_string(lengths[b]) +
                                    " drafts, expected 0 to " + std::to_string(task.drafts));
    latest_.assign(slots.size(), {});
    for (size_t b = 0; b < slots.size(); b++) latest_[b].slot = slots[b], latest_[b].limit = limits[b];
    const size_t all = slots.size() * static_cast<size_t>(task.drafts);
    logits_.resize(all), adjusted_.resize(all), survival_.resize(all);
    Numbers keep(lengths.size(), 0);
    task.rows = latest_.data();
    task.confidence = data_or_null(confidence);
    task.lengths = lengths.data();
    task.slope = model_.positions;
    task.shift = model_.positions + model_.known;
    task.row_shift = model_.row_shift;
    task.seconds = seconds.data();
    task.spent = spent;
    task.search = static_cast<Search>(search);
    if (steps_) {  // two steps old, or as old as there is
      const Past& past = past_[steps_ > 1 ? steps_ % 2 : 0];
      task.past = past.survival.data();
      task.past_rows = past.rows, task.past_drafts = past.drafts, task.past_batch = past.batch;
    }
    task.at_least = at_least;
    task.logits = logits_.data(), task.adjusted = adjusted_.data(), task.survival = survival_.data();
    task.keep = keep.data();
    const int64_t rows = outrider::schedule(task);  // with the GIL: giving it back takes longer than a few rows
    latest_.resize(static_cast<size_t>(rows));
    drafts_ = task.drafts;
    if (rows) {
      Past& past = past_[steps_++ % 2];
      past.survival.assign(survival_.begin(), survival_.begin() + rows * drafts_);
      past.rows = rows, past.drafts = drafts_, past.batch = task.batch;
    }
    return keep;
  }

  int64_t accept(const Numbers& accepted, const Numbers& slots, const Numbers& limits, bool scheduled) {
    if (slots.size() != limits.size()) throw std::invalid_argument("slots and limits are of the same rows");
    expect_slots(slots, static_cast<size_t>(history_.slots));
    if (!scheduled) latest_.clear();
    for (const ScheduledRow& row : latest_)
      if (row.row >= static_cast<int64_t>(accepted.size()) || row.row >= static_cast<int64_t>(slots.size()))
        throw std::invalid_argument("accepted needs a number for each row");
    int64_t gained = 0;
    size_t next = 0;
    for (size_t b = 0; b < slots.size(); b++) {
      if (next < latest_.size() && latest_[next].row == static_cast<int64_t>(b)) {
        ScheduledRow& row = latest_[next];
        gained += row.accepted = accepted[b];
        for (int64_t j = 0; j < width_; j++) {
          const auto at = static_cast<size_t>(static_cast<int64_t>(next) * drafts_ + j);
          pending_logits_.push_back(j < drafts_ ? logits_[at] : 0);
          pending_adjusted_.push_back(j < drafts_ ? adjusted_[at] : 0);
        }
        rows_.push_back(row);
        next++;
      } else if (limits[b]) {  // the drafter was asked and had nothing to propose
        const double zero = 0;
        const int64_t numbers[3] = {slots[b], 0, history_.drafts};
        add_to_history(history_, {1, 1, {&zero, 1}, {numbers, 1}, {numbers + 1, 1}, {numbers + 2, 1}});
      }
    }
    return gained;
  }

  int64_t pending() const { return static_cast<int64_t>(rows_.size()); }

  void learn(int64_t turn) {
    if (rows_.empty()) return;
    const size_t every = std::max<size_t>(1, rows_.size() / kLearntRows), first = static_cast<size_t>(turn) % every;
    const auto rounds = static_cast<int64_t>((rows_.size() - first + every - 1) / every);
    const auto step = static_cast<int64_t>(every);
    const auto column = [&](int64_t ScheduledRow::* number) {
      return IntColumn{&(rows_[first].*number), step * kScheduledColumns};
    };
    const int64_t start = static_cast<int64_t>(first) * width_;
    const DoubleRows logits{pending_logits_.data() + start, step * width_};
    update_acceptance(model_, {rounds, width_, logits, {pending_adjusted_.data() + start, step * width_},
                               column(&ScheduledRow::slot), column(&ScheduledRow::keep),
                               column(&ScheduledRow::accepted)});
    add_to_history(history_, {rounds, std::min(width_, history_.drafts), logits, column(&ScheduledRow::slot),
                              column(&ScheduledRow::length), column(&ScheduledRow::limit)});
    rows_.clear(), pending_logits_.clear(), pending_adjusted_.clear();
  }

  std::tuple<int64_t, double, bool, Numbers, int64_t, double> plan(
      const Numbers& slots, int64_t batch, int64_t samples, const DoubleVector& seconds, double plain,
      const Numbers& lengths, std::function<double(int64_t, int64_t)> draft, int64_t turn, int64_t search,
      double spared) {
    expect_slots(slots, static_cast<size_t>(history_.slots));
    if (slots.empty() || samples < 1 || seconds.size() < 2 || lengths.empty() || turn < 0)
      throw std::invalid_argument("a plan needs rows, samples, seconds and lengths");
    for (const int64_t length : lengths)
      if (length < 1 || length > history_.drafts)
        throw std::invalid_argument("a length is between 1 and " + std::to_string(history_.drafts));
    const std::vector<double> survival = expected_survivals(history_, model_, slots, samples, turn);
    PlanTask task;
    task.survival = survival.data();
    task.rows = static_cast<int64_t>(slots.size()), task.samples = samples, task.drafts = history_.drafts;
    task.batch = batch;
    task.seconds = seconds.data(), task.many = static_cast<int64_t>(seconds.size());
    task.plain = plain;
    task.lengths = lengths;
    task.draft = std::move(draft);
    task.early = search < 0 || search == static_cast<int64_t>(Search::early);
    task.budget = search < 0 || search == static_cast<int64_t>(Search::lagged);
    task.all = search == static_cast<int64_t>(Search::global);
    task.spared = spared;
    const Plan best = best_plan(task);
    return {best.length,       best.rate,      best.budget, Numbers(best.chosen.begin(), best.chosen.end()),
            best.whole_length, best.whole_rate};
  }

  // Of the latest step that drafted: rows as outrider.scheduling.schedule.Round has them, and logits, corrected
  // probabilities and survivals, a draft after the other.
  std::tuple<std::vector<Numbers>, std::vector<std::vector<double>>> latest() const {
    std::vector<Numbers> rows;
    for (const ScheduledRow& row : latest_)
      rows.push_back({row.row, row.slot, row.length, row.limit, row.keep, row.accepted});
    const auto some = static_cast<ptrdiff_t>(latest_.size()) * drafts_;
    std::vector<std::vector<double>> numbers;
    for (const auto* all : {&logits_, &adjusted_, &survival_}) numbers.emplace_back(all->begin(), all->begin() + some);
    return {rows, numbers};
  }

 private:
  struct Past {
    std::vector<double> survival;
    int64_t rows = 0, drafts = 0, batch = 0;
  };

  nb::tuple arrays_;  // keeps them alive
  Acceptance model_;
  History history_;
  int64_t width_ = 0, drafts_ = 0, steps_ = 0;
  std::vector<ScheduledRow> latest_, rows_;                   // of the latest step; not learnt from yet
  std::vector<double> logits_, adjusted_, survival_;          // [latest, drafts]
  std::vector<double> pending_logits_, pending_adjusted_;     // [rows, width]
  Past past_[2];
};

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

void learn_acceptance(const Part& logits, const Part& adjusted, const Column& slots, const Column& verified,
                      const Column& accepted, const DoubleMatrix& positions, const Doubles& row_shift,
                      const Doubles& row_curvature) {
  const size_t rounds = logits.shape(0), drafts = logits.shape(1);
  const Acceptance model = view(positions, row_shift, row_curvature);
  if (static_cast<int64_t>(drafts) > model.known) throw std::invalid_argument("positions do not fit the drafts");
  const IntColumn slot_of = column("slots", slots, rounds);
  for (size_t i = 0; i < rounds; i++) {
    const int64_t slot = slot_of[static_cast<int64_t>(i)];
    if (slot < 0 || slot >= model.slots) throw std::invalid_argument("slot " + std::to_string(slot) + " is not known");
  }
  update_acceptance(model, {static_cast<int64_t>(rounds), static_cast<int64_t>(drafts),
                            part("logits", logits, rounds, drafts), part("adjusted", adjusted, rounds, drafts), slot_of,
                            column("verified", verified, rounds), column("accepted", accepted, rounds)});
}

}  // namespace

void bind_scheduling(nb::module_& m) {
  nb::class_<Scheduler>(m, "Scheduler", "What outrider.scheduling.schedule.NumpyScheduler is, in plain loops.")
      .def(nb::init<>())
      .def("bind", &Scheduler::bind, "positions"_a.noconvert(), "row_shift"_a.noconvert(),
           "row_curvature"_a.noconvert(), "logits"_a.noconvert(), "sizes"_a.noconvert(), "counts"_a.noconvert(),
           "shared"_a.noconvert(), "shared_sizes"_a.noconvert(), "shared_count"_a.noconvert(),
           "The arrays of an AcceptanceModel and a DraftHistory, to be worked on in place.")
      .def("schedule", &Scheduler::schedule, "confidence"_a.none(), "lengths"_a, "slots"_a, "limits"_a,
           "seconds"_a.noconvert(), "spent"_a, "search"_a, "at_least"_a, "Drafts of each row to verify.")
      .def("accept", &Scheduler::accept, "accepted"_a, "slots"_a, "limits"_a, "scheduled"_a,
           "What became of the step's drafts; returns how many were accepted.")
      .def_prop_ro("pending", &Scheduler::pending)
      .def("learn", &Scheduler::learn, "turn"_a)
      .def("plan", &Scheduler::plan, "slots"_a, "batch"_a, "samples"_a, "seconds"_a.noconvert(), "plain"_a, "lengths"_a,
           "draft"_a, "turn"_a, "search"_a, "spared"_a,
           "(drafts, tokens per second, whether by a budget, 0 or 1 for each row, and drafts and tokens per second where "
           "all drafts of all rows are verified). search: -1 early or by a budget.")
      .def("latest", &Scheduler::latest);
  m.def("learn_acceptance", &learn_acceptance, "logits"_a.noconvert(), "adjusted"_a.noconvert(), "slots"_a.noconvert(),
        "verified"_a.noconvert(), "accepted"_a.noconvert(), "positions"_a.noconvert(), "row_shift"_a.noconvert(),
        "row_curvature"_a.noconvert(), "outrider.scheduling.acceptance.AcceptanceModel.update, in place.");
}

}  // namespace outrider
