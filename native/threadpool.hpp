// A few persistent threads that run one job together, with barriers inside the job.
//
// Waiting spins for a moment, then yields, then sleeps in the kernel, so that a busy neighbour costs its share of a
// core and an idle pool costs nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace outrider {

// A counter that threads wait on until it moves past a value.
class alignas(64) Epoch {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  // `crowded` says whether somebody this thread waits for needs the very core it spins on.
  template <class Crowded>
  void wait_past(uint32_t seen, int yields, Crowded&& crowded);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls job(thread) on every thread, 0 on the caller's; returns when all are done. One job at a time; a job that
  // throws ends the process, so jobs check nothing: their callers do.
  template <class Job>
  void run(Job&& job) {
    run_raw([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
  }

  // All threads of the running job meet here.
  void barrier();

  // Calls item(i) for 0 <= i < count, each on one thread: first every thread's own share, in order, then what slower
  // threads have left. All threads call this equally often, with a barrier between two calls.
  template <class Item>
  void deal(int thread, int64_t count, Item&& item) {
    const unsigned turn = places_[thread].turn++ % 2;
    places_[thread].taken[1 - turn].store(0, std::memory_order_relaxed);  // nobody is in the turn before any more
    for (int k = 0; k < threads_; k++) {
      const int owner = thread + k < threads_ ? thread + k : thread + k - threads_;
      int64_t first, last;
      share(count, owner, first, last);
      for (int64_t i; (i = first + places_[owner].taken[turn].fetch_add(1, std::memory_order_relaxed)) < last;) item(i);
    }
  }

  // The share [first, last) of `count` items that belongs to `thread`.
  void share(int64_t count, int thread, int64_t& first, int64_t& last) const {
    first = count * thread / threads_;
    last = count * (thread + 1) / threads_;
  }

  // Cores this process may use, or OUTRIDER_THREADS where that is smaller.
  static int default_threads();

 private:
  using Call = void (*)(void* context, int thread);
  void run_raw(Call call, void* context);
  void work(int thread);
  bool crowded(int cpu) const;
  void move_away();

  const int threads_;
  std::mutex one_job_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  Epoch job_, meeting_;
  alignas(64) std::atomic<int> arrived_{0};
  struct alignas(64) Place {
    std::atomic<int64_t> taken[2] = {};  // items taken of this thread's share, in even and odd turns of `deal`
    unsigned turn = 0;
    std::atomic<int> cpu{-1};  // where the thread was when it last met the others
  };
  std::vector<Place> places_;
  std::vector<int> cores_;     // those this process may use
  std::vector<std::thread> workers_;
};

// The pool every stack of this process shares; `set_threads` replaces it between jobs.
std::shared_ptr<ThreadPool> shared_pool();
void set_threads(int threads);

}  // namespace outrider
