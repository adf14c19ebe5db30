// Corrects confidences for what verification accepted: outrider.scheduling.calibration.Scaling.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace outrider {

// Temperatures and shifts, the last of them for all later positions, and the largest logit. As Python passes them.
using Scaling = std::tuple<std::vector<double>, std::vector<double>, double>;
using Scalings = std::vector<std::optional<Scaling>>;  // one per row; none leaves the row as it is

// sigmoid(logit(c) / temperature + shift) of one row, in place.
inline void scale_confidences(const Scaling& scaling, float* confidence, int64_t width) {
  const auto& [temperatures, shifts, largest] = scaling;
  if (temperatures.empty() || temperatures.size() != shifts.size())
    throw std::invalid_argument("a scaling needs as many shifts as temperatures, one at least");
  for (int64_t j = 0; j < width; j++) {
    const size_t at = std::min<size_t>(j, temperatures.size() - 1);
    const double p = confidence[j];
    double z = p <= 0 ? -largest : p >= 1 ? largest : std::log(p / (1 - p));  // and NaN stays NaN
    z = std::min(std::max(z, -largest), largest) / temperatures[at] + shifts[at];
    const double small = std::exp(-std::fabs(z));  // never overflows
    confidence[j] = static_cast<float>((z >= 0 ? 1 : small) / (1 + small));
  }
}

}  // namespace outrider
