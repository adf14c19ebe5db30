#include "product_timer.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <utility>

#include "arena.hpp"
#include "pack.hpp"
#include "threadpool.hpp"

namespace outrider {

namespace {

constexpr int kInner = 1024;
constexpr size_t kPieceBytes = size_t{1} << 19;  // a fraction of a millisecond: shorter than a slice of the scheduler

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Puts one setting into force for a kind of weights, and the earlier one back at the end.
class Setting {
 public:
  Setting(const Kernels& kernels, DType dtype, ProductSetting setting) {
    ReadAhead& read_ahead = *kernels.read_ahead;
    if (setting.ahead) replace(read_ahead.bytes, setting.ahead);
    replace(read_ahead.rows[static_cast<int>(width_of(dtype))], setting.ahead ? 1 : std::numeric_limits<int>::max());
    if (setting.tile_rows && kernels.tile_rows)
      replace(kernels.tile_rows[static_cast<int>(tile_use_of(dtype))], setting.tile_rows);
  }
  ~Setting() {
    for (const auto& [number, earlier] : replaced_) *number = earlier;
  }

 private:
  void replace(std::atomic<int>& number, int value) { replaced_.emplace_back(&number, number.exchange(value)); }
  std::vector<std::pair<std::atomic<int>*, int>> replaced_;
};

// Rows of zeros: the time of a product does not depend on the values.
struct ZeroRows {
  ZeroRows(Arena& arena, int rows, size_t bytes_per_row) {
    const size_t groups = static_cast<size_t>(rows) * (kInner / kGroup);
    operand.data = arena.take<char>(rows * bytes_per_row);
    operand.stride = bytes_per_row;
    operand.scale = arena.take<float>(groups);
    operand.sums = arena.take<int32_t>(groups);
    operand.offsets = arena.take<float>(groups);
    operand.sums_stride = kInner / kGroup;
  }
  Operand operand;
};

}  // namespace

std::vector<double> time_products(const Kernels& kernels, DType dtype, size_t bytes,
                                  const std::vector<ProductSetting>& settings, double seconds) {
  Arena arena;
  int most = 1;
  for (const ProductSetting& setting : settings) most = std::max(most, setting.rows);
  const size_t per_panel = Linear(arena, kernels, dtype, kInner, 1, false).weights().panel_bytes;
  const int per_piece = static_cast<int>(std::max<size_t>(1, kPieceBytes / per_panel));
  const int pieces = static_cast<int>(std::max<size_t>(1, bytes / per_panel / per_piece));
  const Linear linear(arena, kernels, dtype, kInner, pieces * per_piece, false);
  for (size_t i = 0; i < arena.regions(); i++) std::memset(arena.data(i), 0, arena.used(i));  // real pages
  const ZeroRows rows(arena, most, static_cast<size_t>(kInner) * kernels.operand_bytes(dtype) + 64);
  const auto pool = shared_pool();
  const size_t tile = static_cast<size_t>(most) * kernels.panel;
  std::vector<float> products(tile * pool->threads());
  std::vector<std::vector<std::vector<double>>> times(settings.size(), std::vector<std::vector<double>>(pieces));
  const Clock::time_point began = Clock::now();
  do {
    for (size_t s = 0; s < settings.size(); s++) {
      const Setting in_force(kernels, dtype, settings[s]);
      pool->run([&](int thread) {
        pool->parallel_for(thread, pieces, [&](int64_t piece) {
          const Clock::time_point start = Clock::now();
          for (int p = static_cast<int>(piece) * per_piece; p < (piece + 1) * per_piece; p++)
            kernels.gemm(linear.weights(), rows.operand, settings[s].rows, p, p + 1, products.data() + thread * tile,
                         kernels.panel);
          times[s][piece].push_back(seconds_since(start));
        });
      });
    }
  } while (seconds_since(began) < seconds);
  std::vector<double> totals;
  for (std::vector<std::vector<double>>& of_setting : times) {
    double total = 0.0;
    for (std::vector<double>& of_piece : of_setting) {
      const auto quartile = of_piece.begin() + static_cast<ptrdiff_t>(of_piece.size() - 1) / 4;
      std::nth_element(of_piece.begin(), quartile, of_piece.end());
      total += *quartile;
    }
    totals.push_back(total / pool->threads());
  }
  return totals;
}

}  // namespace outrider
