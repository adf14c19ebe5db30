// Python bindings: threads, instruction sets, memory bandwidth.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "arena.hpp"
#include "bindings.hpp"
#include "kernels.hpp"
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
  m.def("instruction_sets", &usable_kernels, "Those this build has and this processor runs, best first.");
}

}  // namespace outrider
