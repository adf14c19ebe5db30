// Python bindings: threads, instruction sets, memory bandwidth, and what is tuned to a machine.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "arena.hpp"
#include "bindings.hpp"
#include "kernels.hpp"
#include "product_timer.hpp"
#include "threadpool.hpp"

namespace outrider {

using namespace nb::literals;

namespace {

double read_bandwidth(size_t bytes, int repeats) {
  constexpr size_t piece = size_t{1} << 20;
  Region region(bytes);
  std::memset(region.data(), 1, bytes);
  const auto pool = shared_pool();
  const Kernels& kernels = find_kernels();
  double best = 0.0;
  std::atomic<double> sink{0.0};  // keeps the compiler from removing the loads
  nb::gil_scoped_release released;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool->run([&](int thread) {
      pool->parallel_for(thread, static_cast<int64_t>((bytes + piece - 1) / piece), [&](int64_t p) {
        const size_t first = static_cast<size_t>(p) * piece;
        sink.store(kernels.read_sum(region.data() + first, std::min(piece, bytes - first)), std::memory_order_relaxed);
      });
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return best;
}

using Settings = std::vector<std::tuple<int, int, int>>;

std::vector<double> products(const std::string& isa, DType dtype, size_t bytes, const Settings& settings,
                             double seconds) {
  std::vector<ProductSetting> list;
  for (const auto& [rows, ahead, tile_rows] : settings) {
    if (rows < 1 || rows > kRowBlock || ahead < 0 || tile_rows < 0)
      throw std::invalid_argument("a setting needs 1 to 256 rows, and bytes ahead and rows of tiles of 0 or more");
    list.push_back({rows, ahead, tile_rows});
  }
  const Kernels& kernels = find_kernels(isa);
  nb::gil_scoped_release released;
  return time_products(kernels, dtype, bytes, list, seconds);
}

std::pair<int, std::vector<int>> read_ahead(const std::string& isa) {
  const ReadAhead& now = *find_kernels(isa).read_ahead;
  return {now.bytes, {now.rows, now.rows + kWidths}};
}

void set_read_ahead(const std::string& isa, int bytes, const std::vector<int>& rows) {
  if (bytes < 64 || bytes > 1 << 20) throw std::invalid_argument("bytes to read ahead must be between 64 and 2^20");
  if (rows.size() != kWidths || *std::min_element(rows.begin(), rows.end()) < 1)
    throw std::invalid_argument("rows must be 4 positive numbers: float32, bfloat16, 8 bits, 4 bits");
  ReadAhead& now = *find_kernels(isa).read_ahead;
  now.bytes = bytes;
  std::copy(rows.begin(), rows.end(), now.rows);
}

std::vector<int> tile_rows(const std::string& isa) {
  const std::atomic<int>* now = find_kernels(isa).tile_rows;
  return now ? std::vector<int>(now, now + kTileUses) : std::vector<int>();
}

void set_tile_rows(const std::string& isa, const std::vector<int>& rows) {
  std::atomic<int>* now = find_kernels(isa).tile_rows;
  if (!now) throw std::invalid_argument("instruction set " + isa + " has no matrix tiles");
  if (rows.size() != kTileUses || *std::min_element(rows.begin(), rows.end()) < 1)
    throw std::invalid_argument("rows must be 3 positive numbers: bytes, groups of bytes, groups of nibbles");
  std::copy(rows.begin(), rows.end(), now);
}

}  // namespace

void bind_diagnostics(nb::module_& m) {
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "repeats"_a = 3,
        "Best bytes per second of `repeats` reads by all threads over fresh memory.");
  m.def("threads", [] { return shared_pool()->threads(); });
  m.def("set_threads", [](int threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be between 1 and 1024");
    nb::gil_scoped_release released;
    set_threads(threads);
  });
  m.def("time_products", &products, "isa"_a, "dtype"_a, "bytes"_a, "settings"_a, "seconds"_a,
        "Seconds of a product with a matrix of `bytes` bytes for each setting (rows, bytes to read ahead; 0: none, rows "
        "from which on matrix tiles are used; 0: as they are), measured in turns for `seconds` seconds.");
  m.def("read_ahead", &read_ahead, "isa"_a,
        "Bytes that are read ahead, and from how many rows on: float32, bfloat16, 8 bits, 4 bits a weight.");
  m.def("set_read_ahead", &set_read_ahead, "isa"_a, "bytes"_a, "rows"_a);
  m.def("tile_rows", &tile_rows, "isa"_a,
        "From how many rows on matrix tiles are used: bytes, groups of bytes, groups of nibbles; empty without tiles.");
  m.def("set_tile_rows", &set_tile_rows, "isa"_a, "rows"_a);
  m.def("instruction_sets", &usable_kernels, "Those this build has and this processor runs, best first.");
  m.def("emulated_instruction_sets", &emulated_kernels, "Those that are emulated, for tests; used when asked for by name.");
  m.def("same_products",
        [](const std::string& left, const std::string& right) {
          return same_products(find_kernels(left), find_kernels(right));
        },
        "left"_a, "right"_a,
        "Whether two instruction sets give the same bits for products of every format that matrix tiles compute: what a "
        "machine's tiles have to do beside emulated ones before they are used.");
  m.def("why_no_tiles", &why_no_tiles, "Why this process cannot use matrix tiles; empty where it can.");
}

}  // namespace outrider
