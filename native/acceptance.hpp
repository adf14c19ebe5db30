// How likely drafts are accepted, and learning it from verified drafts: outrider.scheduling.acceptance in plain loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

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

// The arrays of AcceptanceModel.
struct Acceptance {
  double* positions = nullptr;  // [4, known]: slopes, shifts, curvatures of the shifts and of the slopes
  int64_t known = 0;            // drafts
  double *row_shift = nullptr, *row_curvature = nullptr;  // [slots]
  int64_t slots = 0;

  double probability(double logit, int64_t position, double row_shift) const {
    return 1 / (1 + std::exp(-(logit * positions[position] + positions[known + position] + row_shift)));
  }
};

// AcceptanceModel.update. D rounds of K drafts, several of them perhaps of one slot.
struct AcceptanceUpdate {
  int64_t rounds, drafts;               // D, K, at most those known
  DoubleRows logits, adjusted;          // [D, K]
  IntColumn slots, verified, accepted;  // [D]
};
void update_acceptance(const Acceptance& model, const AcceptanceUpdate& update);

// The arrays of DraftHistory: logits of drafts, and how many there were and might have been.
struct History {
  double* logits = nullptr;   // [slots, kept, K]
  int64_t* sizes = nullptr;   // [slots, kept, 2]: drafts, and the most that were asked for
  int64_t* counts = nullptr;  // [slots]
  double* shared = nullptr;   // [shared_kept, K], of all rows
  int64_t* shared_sizes = nullptr;  // [shared_kept, 2]
  int64_t* shared_count = nullptr;  // [1]
  int64_t slots = 0, kept = 0, shared_kept = 0, drafts = 0;
};

// DraftHistory.add. D rounds of at most K drafts each.
struct HistoryUpdate {
  int64_t rounds, width;             // D, and drafts of each, at most K
  DoubleRows logits;                 // [D, width]
  IntColumn slots, lengths, limits;  // [D]
};
void add_to_history(const History& history, const HistoryUpdate& update);

// DraftHistory.of: survivals [rows, samples, K] of the latest drafts of some slots.
std::vector<double> expected_survivals(const History& history, const Acceptance& model,
                                       const std::vector<int64_t>& slots, int64_t samples, int64_t turn);

}  // namespace outrider
