// A few persistent threads that run one job together, with barriers inside the job.
//
// Waiting threads spin for a moment, then yield, then sleep in the kernel, so an idle pool costs nothing. On a busy
// machine a thread may lose its core for milliseconds, and all others would wait for it at every barrier. Therefore
// workers are optional: the caller can do all of a job alone, a worker joins if it wakes up in time, and a worker that
// reaches a barrier much later than the caller is dropped from the job. After that the caller works alone for a while.
// The results of a job do not depend on which threads took part.
#pragma once

#include <atomic>
#include <chrono>
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
  // `core_is_shared` tells whether a thread that is waited for runs on the same core; then spinning stops early.
  // `after_spinning` is called when spinning has not helped, and between yields.
  template <class CoreIsShared, class AfterSpinning>
  void wait_past(uint32_t seen, int yields, CoreIsShared&& core_is_shared, AfterSpinning&& after_spinning);

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

  // Calls job(thread) on the caller's thread, number 0, and on the workers that take part; returns when all are done.
  // Work must be shared by `parallel_for`, since a worker may be missing, or leave at a barrier (by an exception). One
  // job at a time. A job that throws ends the process: check arguments before the job. Whether all threads took part
  // from beginning to end. A worker that missed the beginning misses the whole job, so long work should be several jobs.
  template <class Job>
  bool run(Job&& job) {
    return run_raw([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
  }

  // Waits until all threads of the running job are here.
  void barrier() { wait_at_barrier(false); }

  // Calls item(i) for 0 <= i < count, each on one thread: every thread runs its own share in order, then takes over
  // what slower or missing threads have left. All threads of the job must call this, with a barrier between two calls.
  template <class Item>
  void parallel_for(int thread, int64_t count, Item&& item) {
    for (int k = 0; k < threads_; k++) {
      const int owner = thread + k < threads_ ? thread + k : thread + k - threads_;
      const int64_t first = count * owner / threads_, last = count * (owner + 1) / threads_;
      for (int64_t i; (i = first + per_thread_[owner].taken.fetch_add(1, std::memory_order_relaxed)) < last;) item(i);
    }
  }

  // Cores this process may use, or OUTRIDER_THREADS where that is smaller.
  static int default_threads();

 private:
  using Call = void (*)(void* context, int thread);
  using Clock = std::chrono::steady_clock;
  struct Dropped {};  // thrown at a barrier in a worker that came too late

  // The state of the running job in one word, so that one atomic change completes a barrier: threads that have arrived
  // at the barrier, threads that take part, and whether workers can no longer join.
  static constexpr uint64_t kArrived = 1, kMember = uint64_t{1} << 20, kClosed = uint64_t{1} << 40;
  static constexpr uint64_t kCount = kMember - 1;
  static bool complete(uint64_t state) {
    return state >= kClosed && (state & kCount) == (state / kMember & kCount);
  }

  bool run_raw(Call call, void* context);
  void work(int thread);
  bool join();
  void wait_at_barrier(bool last);
  void arrive(uint64_t change, uint32_t barrier);
  void wait_for_workers(bool last);
  void release(uint64_t state);
  void back_off(Clock::duration lost);
  bool core_is_shared(int cpu) const;
  void note_core(int cpu);
  void move_to_free_core();

  const int threads_;
  std::mutex one_job_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  Epoch job_, barrier_;  // advance when a job starts, and when a barrier is complete
  alignas(64) std::atomic<uint64_t> state_{kClosed};
  std::atomic<bool> drop_late_{false};  // the caller has waited too long: workers that arrive now are dropped
  // Used by the caller only.
  Clock::time_point job_began_, phase_began_, alone_until_;
  Clock::duration shared_time_{};  // time of jobs with workers since the caller last waited in vain
  struct alignas(64) PerThread {
    std::atomic<int64_t> taken{0};  // items taken of this thread's share
    std::atomic<int> cpu{-1};       // core of the thread at its last barrier
  };
  std::vector<PerThread> per_thread_;
  std::vector<int> cores_;  // cores this process may use
  std::vector<std::thread> workers_;
};

// The pool that all stacks of this process share; `set_threads` replaces it between jobs.
std::shared_ptr<ThreadPool> shared_pool();
void set_threads(int threads);

}  // namespace outrider
