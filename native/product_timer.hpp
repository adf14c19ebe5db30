// How long products take with weights in memory, for tuning a machine (backends/tuning.py).
#pragma once

#include <vector>

#include "kernels.hpp"

namespace outrider {

struct ProductSetting {
  int rows;
  int ahead;      // bytes of ReadAhead; 0: no prefetch
  int tile_rows;  // TileRows of the matrix's format; 0: as they are
};

// Seconds of a product with all of a matrix of `bytes` bytes, on all threads, for each setting. The matrix is
// multiplied piece by piece, round after round with the settings in turns, until `seconds` have passed; a figure is the
// sum of the lower quartile of each piece's times, so another process that takes the processor for a while changes
// little. (Least times of many rounds would be those of the few in which a piece was still in a cache.)
std::vector<double> time_products(const Kernels& kernels, DType dtype, size_t bytes,
                                  const std::vector<ProductSetting>& settings, double seconds);

}  // namespace outrider
