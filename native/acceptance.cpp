#include "acceptance.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace outrider {

namespace {

// As in outrider.scheduling.acceptance.
constexpr double kMemory = 100, kRowMemory = 40;
constexpr double kPrior = 1, kSlopePrior = 6, kRowPrior = 4;
constexpr double kPull = 0.001, kFollow = 0.1, kLeastSlope = 0.05, kMostSlope = 4;
constexpr int64_t kSharedRows = 8;

struct Sums {
  double seen = 0, error = 0, curvature = 0, slope_error = 0, slope_curvature = 0;
};

}  // namespace

void update_acceptance(const Acceptance& model, const AcceptanceUpdate& update) {
  std::vector<Sums> positions(static_cast<size_t>(update.drafts)), slots(static_cast<size_t>(model.slots));
  for (int64_t i = 0; i < update.rounds; i++) {
    const double *logits = update.logits[i], *adjusted = update.adjusted[i];
    const int64_t accepted = update.accepted[i];
    const int64_t seen = std::min(std::min(update.verified[i], accepted + 1), update.drafts);
    Sums row;
    for (int64_t j = 0; j < seen; j++) {
      const double error = (j < accepted ? 1.0 : 0.0) - adjusted[j], curvature = adjusted[j] * (1 - adjusted[j]);
      Sums& position = positions[static_cast<size_t>(j)];
      position.seen++;
      position.error += error;
      position.curvature += curvature;
      position.slope_error += error * logits[j];
      position.slope_curvature += curvature * logits[j] * logits[j];
      row.error += error;
      row.curvature += curvature;
    }
    Sums& slot = slots[static_cast<size_t>(update.slots[i])];
    slot.seen += static_cast<double>(std::max<int64_t>(seen, 0));
    slot.error += row.error;
    slot.curvature += row.curvature;
  }
  double *slope = model.positions, *shift = slope + model.known;
  double *known = shift + model.known, *slope_known = known + model.known;
  double slope_before = 1, shift_before = 0;  // of the position before: what little is known of one follows
  for (int64_t j = 0; j < model.known; j++) {
    const double slope_then = slope[j], shift_then = shift[j];
    slope[j] += (j ? kFollow * kSlopePrior / slope_known[j] : kPull) * (slope_before - slope[j]);
    shift[j] += (j ? kFollow * kPrior / known[j] : kPull) * (shift_before - shift[j]);
    slope_before = slope_then, shift_before = shift_then;
    if (j >= update.drafts) continue;
    const Sums& sums = positions[static_cast<size_t>(j)];
    const double keep = std::pow(1 - 1 / kMemory, sums.seen);
    known[j] = std::max(keep * known[j], kPrior) + sums.curvature;
    shift[j] += sums.error / known[j];
    slope_known[j] = std::max(keep * slope_known[j], kSlopePrior) + sums.slope_curvature;
    slope[j] = std::min(std::max(slope[j] + sums.slope_error / slope_known[j], kLeastSlope), kMostSlope);
  }
  for (int64_t s = 0; s < model.slots; s++) {
    const Sums& sums = slots[static_cast<size_t>(s)];
    if (!sums.seen) continue;
    const double keep = std::pow(1 - 1 / kRowMemory, sums.seen);
    model.row_curvature[s] = std::max(keep * model.row_curvature[s], kRowPrior) + sums.curvature;
    model.row_shift[s] = keep * model.row_shift[s] + sums.error / model.row_curvature[s];
  }
}

void add_to_history(const History& history, const HistoryUpdate& update) {
  const int64_t every = std::max<int64_t>(1, update.rounds / kSharedRows);
  const auto put = [&](double* logits, int64_t* sizes, int64_t at, int64_t i) {
    std::fill_n(logits + at * history.drafts, history.drafts, 0.0);
    std::copy_n(update.logits[i], update.width, logits + at * history.drafts);
    sizes[2 * at] = update.lengths[i], sizes[2 * at + 1] = update.limits[i];
  };
  for (int64_t i = 0; i < update.rounds; i++) {
    const int64_t slot = update.slots[i];
    put(history.logits, history.sizes, slot * history.kept + history.counts[slot]++ % history.kept, i);
    if (i % every == 0)
      put(history.shared, history.shared_sizes, history.shared_count[0]++ % history.shared_kept, i);
  }
}

std::vector<double> expected_survivals(const History& history, const Acceptance& model,
                                       const std::vector<int64_t>& slots, int64_t samples, int64_t turn) {
  const int64_t drafts = history.drafts, known = std::min(history.shared_count[0], history.shared_kept);
  // What each position is like in general: its mean probability, with two of the position before's.
  std::vector<double> means(static_cast<size_t>(drafts));
  for (int64_t j = 0; j < drafts; j++) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < known; i++)
      if (history.shared_sizes[2 * i] > j) sum += model.probability(history.shared[i * drafts + j], j, 0), count++;
    const double here = sum / static_cast<double>(std::max<int64_t>(count, 1));
    means[static_cast<size_t>(j)] =
        j ? (static_cast<double>(count) * here + 2 * means[static_cast<size_t>(j - 1)]) / static_cast<double>(count + 2)
          : here;
  }
  std::vector<double> found;
  found.reserve(slots.size() * static_cast<size_t>(samples * drafts));
  int64_t missing = 0;
  for (const int64_t slot : slots)
    for (int64_t s = 0; s < samples; s++) {
      const int64_t at = (turn + s) % history.kept;
      const double* logits = history.logits + (slot * history.kept + at) * drafts;
      const int64_t* sizes = history.sizes + 2 * (slot * history.kept + at);
      if (at >= history.counts[slot] && known) {  // of another row
        const int64_t pick = (turn + 7 * missing++) % known;
        logits = history.shared + pick * drafts, sizes = history.shared_sizes + 2 * pick;
      }
      const int64_t length = sizes[0], limit = sizes[1];
      double product = 1, own = 0, usual = 0;
      for (int64_t j = 0; j < drafts; j++) {
        double p = 0;
        if (j < length) {
          p = model.probability(logits[j], j, model.row_shift[slot]);
          own += p, usual += means[static_cast<size_t>(j)];
        } else if (limit > 0 && length >= limit) {
          p = std::min(own / std::max(usual, 1e-9) * means[static_cast<size_t>(j)], 0.99);
        }
        found.push_back(product *= p);
      }
    }
  return found;
}

}  // namespace outrider
