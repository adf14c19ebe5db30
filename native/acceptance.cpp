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
constexpr double kPull = 0.001, kLeastSlope = 0.05, kMostSlope = 4;
constexpr int64_t kSharedRows = 8;

struct Sums {
  double seen = 0, error = 0, curvature = 0, slope_error = 0, slope_curvature = 0;
};

}  // namespace

void update_acceptance(const AcceptanceUpdate& update) {
  std::vector<Sums> positions(static_cast<size_t>(update.drafts)), slots(static_cast<size_t>(update.all_slots));
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
  double *slope = update.positions, *shift = slope + update.known;
  double *known = shift + update.known, *slope_known = known + update.known;
  for (int64_t j = 0; j < update.known; j++) {
    slope[j] += kPull * (1 - slope[j]);
    shift[j] -= kPull * shift[j];
    if (j >= update.drafts) continue;
    const Sums& sums = positions[static_cast<size_t>(j)];
    const double keep = std::pow(1 - 1 / kMemory, sums.seen);
    known[j] = std::max(keep * known[j], kPrior) + sums.curvature;
    shift[j] += sums.error / known[j];
    slope_known[j] = std::max(keep * slope_known[j], kSlopePrior) + sums.slope_curvature;
    slope[j] = std::min(std::max(slope[j] + sums.slope_error / slope_known[j], kLeastSlope), kMostSlope);
  }
  for (int64_t s = 0; s < update.all_slots; s++) {
    const Sums& sums = slots[static_cast<size_t>(s)];
    if (!sums.seen) continue;
    const double keep = std::pow(1 - 1 / kRowMemory, sums.seen);
    update.row_curvature[s] = std::max(keep * update.row_curvature[s], kRowPrior) + sums.curvature;
    update.row_shift[s] = keep * update.row_shift[s] + sums.error / update.row_curvature[s];
  }
}

int64_t add_to_history(const HistoryUpdate& update) {
  const int64_t drafts = update.drafts;
  for (int64_t j = 0; j < update.width; j++) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < update.rounds; i++)
      if (update.lengths[i] > j) sum += update.adjusted[i][j], count++;
    if (!count) continue;
    update.reached[j]++;
    const double rate = std::max(0.1, 1 / static_cast<double>(update.reached[j]));
    update.conditional[j] += rate * (sum / static_cast<double>(count) - update.conditional[j]);
  }
  std::vector<double> means(static_cast<size_t>(drafts)), full(static_cast<size_t>(drafts));
  double sum = 0;
  for (int64_t j = 0; j < drafts; j++) {
    sum += update.conditional[j];
    means[static_cast<size_t>(j)] = sum / static_cast<double>(j + 1);
  }
  int64_t shared_count = update.shared_count;
  const int64_t every = std::max<int64_t>(1, update.rounds / kSharedRows);
  for (int64_t i = 0; i < update.rounds; i++) {
    std::fill(full.begin(), full.end(), 0.0);
    std::copy_n(update.survival[i], update.width, full.begin());
    const int64_t limit = update.limits[i];
    if (limit > 0 && update.lengths[i] >= limit) {  // estimate what the limit cut off
      const auto last = static_cast<size_t>(std::min(limit, update.width) - 1);
      const double own = std::pow(full[last], 1 / static_cast<double>(last + 1));
      for (auto j = static_cast<size_t>(limit); j < full.size(); j++) {
        const double trend = update.reached[j] ? update.conditional[j] / means[last] : 1.0;
        full[j] = full[j - 1] * std::min(own * trend, 0.99);
      }
    }
    const int64_t slot = update.slots[i];
    std::copy(full.begin(), full.end(),
              update.rows + (slot * update.kept + update.counts[slot]++ % update.kept) * drafts);
    if (i % every == 0)
      std::copy(full.begin(), full.end(), update.shared + (shared_count++ % update.shared_kept) * drafts);
  }
  return shared_count;
}

}  // namespace outrider
