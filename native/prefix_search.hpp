// A step's schedule: how likely each draft is accepted, and how many drafts of each row to verify. It is what
// outrider.scheduling.schedule does in numpy, decision for decision.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace outrider {

enum class Search : int64_t { early, global, lagged };  // as outrider.scheduling.prefix_search explains them

// A row of int64 [B, 6], the columns of outrider.scheduling.schedule.Round.rows.
struct ScheduledRow {
  int64_t row, slot, length, limit, keep, accepted;
};
constexpr int64_t kScheduledColumns = sizeof(ScheduledRow) / sizeof(int64_t);

struct ScheduleTask {
  const float* confidence = nullptr;  // [>= B, K]; null: the drafter reports none
  const int64_t* lengths = nullptr;   // [>= B]: drafts of each row, at most K
  int64_t batch = 0, drafts = 0;      // B, K
  const double* slope = nullptr;      // [K] and
  const double* shift = nullptr;      // [K]: the corrections of each position,
  const double* row_shift = nullptr;  // and of each slot
  const double* seconds = nullptr;    // [B * K + 1]: of a pass with so many drafts,
  double spent = 0;                   // and of everything else
  Search search = Search::early;
  const double* past = nullptr;  // [past_rows, past_drafts]: survivals two steps old, for lagged; null: the first step
  int64_t past_rows = 0, past_drafts = 0, past_batch = 0;
  int64_t at_least = 0;          // verify at least so many drafts of each row
  ScheduledRow* rows = nullptr;  // [B]: slot and limit of all rows; then, in front, all of the rows that have drafts
  double* logits = nullptr;      // [B, K] each, of the rows that have drafts
  double* adjusted = nullptr;
  double* survival = nullptr;
  int64_t* keep = nullptr;  // [>= B], zeros: drafts to verify
};

// Fills rows, logits, adjusted, survival and keep; returns how many rows have drafts.
int64_t schedule(const ScheduleTask& task);

// outrider.scheduling.prefix_search.best_plan: how far it is best to draft, by survivals that stand for drafting again.
struct PlanTask {
  const double* survival = nullptr;  // [rows, samples, K]
  int64_t rows = 0, samples = 0, drafts = 0, batch = 0;  // of ``batch`` rows, so many can be drafted for
  const double* seconds = nullptr;   // [many]: of a step that drafts by drafts verified, without drafting itself
  int64_t many = 0;
  double plain = 0;                     // tokens per second of plain decoding
  std::vector<int64_t> lengths;         // to try
  std::function<double(int64_t, int64_t)> draft;  // seconds of drafting for so many rows so many tokens
  bool early = true, budget = true, all = false;  // searches that may be used
  double spared = 0;  // seconds by which a step is shorter where nothing is chosen
};
struct Plan {
  int64_t length = 0;
  double rate = 0;  // tokens per second
  bool budget = false;
  std::vector<bool> chosen;  // rows
  int64_t whole_length = 0;  // what is best where all drafts of all rows are verified
  double whole_rate = 0;
};
Plan best_plan(const PlanTask& task);

}  // namespace outrider
