// Learning from verified drafts: outrider.scheduling.acceptance in plain loops, for a few hundred numbers a step.
#pragma once

#include <cstdint>

namespace outrider {

struct IntColumn {
  const int64_t* data;
  int64_t stride;
  int64_t operator[](int64_t row) const { return data[row * stride]; }
};

struct DoubleRows {
  const double* data;
  int64_t stride;
  const double* operator[](int64_t row) const { return data + row * stride; }
};

// AcceptanceModel.update. D rounds of K drafts, several of them perhaps of one slot.
struct AcceptanceUpdate {
  int64_t rounds, drafts;           // D, K
  DoubleRows logits, adjusted;      // [D, K]
  IntColumn slots, verified, accepted;  // [D]
  double* positions;                // [4, known]: slopes, shifts, curvatures of the shifts and of the slopes
  int64_t known;                    // at least K
  double *row_shift, *row_curvature;  // [all slots]
  int64_t all_slots;
};
void update_acceptance(const AcceptanceUpdate& update);

// SurvivalHistory.add.
struct HistoryUpdate {
  int64_t rounds, width;          // D, and drafts of each, at most K
  DoubleRows adjusted, survival;  // [D, width]
  IntColumn slots, lengths, limits;  // [D]
  int64_t drafts, kept, shared_kept;  // K; rounds of each row, and of all
  double* rows;                   // [slots, kept, K]
  int64_t* counts;                // [slots]
  double* shared;                 // [shared_kept, K]
  int64_t shared_count;
  double* conditional;            // [K]
  int64_t* reached;               // [K]
};
int64_t add_to_history(const HistoryUpdate& update);  // returns the new shared_count

}  // namespace outrider
