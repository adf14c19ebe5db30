// A few persistent threads that run one job together, with barriers inside the job.
//
// Waiting spins for a moment, then yields, then sleeps in the kernel, so that an idle pool costs nothing. On a busy
// machine a thread may lose its core for milliseconds, and everybody would wait for it at every barrier. So nobody has
// to take part: the caller can do all of a job, a worker joins if it is there in time, and one that comes to a barrier
// later than the caller has patience for leaves the job. For a while after that the caller works alone. Jobs give the
// same results whoever took part.
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
  // `crowded` says whether somebody this thread waits for needs the very core it spins on; `tired` is told when
  // spinning has not helped, and between yields.
  template <class Crowded, class Tired>
  void wait_past(uint32_t seen, int yields, Crowded&& crowded, Tired&& tired);

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

  // Calls job(thread) on the caller's thread, 0, and on those workers that take part; returns when all are done. What
  // has to be done is dealt, since a worker may be missing, or leave at a barrier by an exception. One job at a time; a
  // job that throws ends the process, so jobs check nothing: their callers do.
  template <class Job>
  void run(Job&& job) {
    run_raw([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
  }

  // All who take part in the running job meet here.
  void barrier() { meet(false); }

  // Calls item(i) for 0 <= i < count, each on one thread: first every thread's own share, in order, then what slower or
  // missing threads have left. All threads call this equally often, with a barrier between two calls.
  template <class Item>
  void deal(int thread, int64_t count, Item&& item) {
    for (int k = 0; k < threads_; k++) {
      const int owner = thread + k < threads_ ? thread + k : thread + k - threads_;
      const int64_t first = count * owner / threads_, last = count * (owner + 1) / threads_;
      for (int64_t i; (i = first + places_[owner].taken.fetch_add(1, std::memory_order_relaxed)) < last;) item(i);
    }
  }

  // Cores this process may use, or OUTRIDER_THREADS where that is smaller.
  static int default_threads();

 private:
  using Call = void (*)(void* context, int thread);
  using Clock = std::chrono::steady_clock;
  struct Dismissed {};  // thrown at a barrier to a worker that came too late

  // Who takes part in the running job, in one word, so that one change makes a barrier complete.
  static constexpr uint64_t kArrived = 1, kMember = uint64_t{1} << 20, kClosed = uint64_t{1} << 40;
  static constexpr uint64_t kCount = kMember - 1;
  static bool complete(uint64_t state) {
    return state >= kClosed && (state & kCount) == (state / kMember & kCount);
  }

  void run_raw(Call call, void* context);
  void work(int thread);
  bool join();
  void meet(bool last);
  void arrive(uint64_t change, uint32_t meeting);
  void wait_for_workers(bool last);
  void release(uint64_t state);
  void rest(Clock::duration lost);
  bool crowded(int cpu) const;
  void move_away();

  const int threads_;
  std::mutex one_job_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stop_{false};
  Epoch job_, meeting_;
  alignas(64) std::atomic<uint64_t> state_{kClosed};
  std::atomic<bool> impatient_{false};  // the caller has waited too long: whoever comes now may go
  // The caller's own.
  Clock::time_point phase_began_, alone_until_;
  Clock::duration together_{};  // of jobs with workers, since the last one waited for in vain
  struct alignas(64) Place {
    std::atomic<int64_t> taken{0};  // items taken of this thread's share
    std::atomic<int> cpu{-1};       // where the thread was when it last met the others
  };
  std::vector<Place> places_;
  std::vector<int> cores_;  // those this process may use
  std::vector<std::thread> workers_;
};

// The pool every stack of this process shares; `set_threads` replaces it between jobs.
std::shared_ptr<ThreadPool> shared_pool();
void set_threads(int threads);

}  // namespace outrider
