#include "threadpool.hpp"

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace outrider {

namespace {

constexpr int kSpins = 2000;        // pauses before the first yield: tens of microseconds
constexpr int kPausesPerCheck = 32;  // pauses between checks of the clock and of shared cores
constexpr int kBarrierYields = 20;  // inside a job; on a busy machine each may cost a time slice
constexpr int kMoveEvery = 16;      // barriers between checks whether to move to another core
// Between jobs, more than a millisecond: a round's work outside the passes should find the workers awake after it. To
// wake one costs both threads some 50 microseconds where a virtual machine's idle processor belongs to its host.
constexpr int kIdleYields = 2500;

using std::chrono::microseconds;
using std::chrono::milliseconds;
constexpr microseconds kMinWait{150};  // the caller waits at least this long for a worker before it drops it
constexpr int kBackOff = 16;           // times what was lost by waiting in vain: so long the caller then works alone
constexpr milliseconds kMaxBackOff{1000};

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -2;
#endif
}

thread_local int self = 0;                  // number of this thread in the job it runs
thread_local unsigned barriers_passed = 0;

}  // namespace

void Epoch::advance() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) value_.notify_all();
}

template <class CoreIsShared, class AfterSpinning>
void Epoch::wait_past(uint32_t seen, int yields, CoreIsShared&& core_is_shared, AfterSpinning&& after_spinning) {
  for (int i = 1; i <= kSpins; i++) {
    if (value() != seen) return;
    pause();
    if (i % kPausesPerCheck == 0 && core_is_shared()) break;
  }
  for (int i = 0; i < yields; i++) {
    after_spinning();
    if (value() != seen) return;
    std::this_thread::yield();
  }
  after_spinning();
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == seen) value_.wait(seen, std::memory_order_seq_cst);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)), per_thread_(threads_) {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; core++)
      if (CPU_ISSET(core, &set)) cores_.push_back(core);
#endif
  for (int thread = 1; thread < threads_; thread++) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  job_.advance();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(int thread) {
  self = thread;
  for (uint32_t seen = 0;;) {
    job_.wait_past(seen, kIdleYields, [this] { return core_is_shared(current_cpu()); }, [] {});
    if (stop_) return;
    seen = job_.value();
    if (!join()) continue;
    try {
      call_(context_, thread);
      wait_at_barrier(true);
    } catch (const Dropped&) {
    }
  }
}

bool ThreadPool::run_raw(Call call, void* context) {
  const std::lock_guard<std::mutex> lock(one_job_);
  self = 0;
  call_ = call;
  context_ = context;
  drop_late_.store(false, std::memory_order_relaxed);
  for (PerThread& entry : per_thread_) entry.taken.store(0, std::memory_order_relaxed);
  job_began_ = phase_began_ = Clock::now();
  const bool alone = threads_ == 1 || job_began_ < alone_until_;
  state_.store(alone ? kClosed | kMember : kMember, std::memory_order_release);
  if (!alone) job_.advance();
  call(context, 0);
  wait_at_barrier(true);
  if (!alone) shared_time_ += phase_began_ - job_began_;
  return static_cast<int>(state_.load(std::memory_order_relaxed) / kMember & kCount) == threads_;
}

// Joins the running job, if it is still open.
bool ThreadPool::join() {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (state < kClosed)
    if (state_.compare_exchange_weak(state, state + kMember, std::memory_order_acq_rel)) return true;
  return false;
}

void ThreadPool::wait_at_barrier(bool last) {
  const uint32_t barrier = barrier_.value();
  if (self == 0) {
    wait_for_workers(last);
    const bool open = state_.load(std::memory_order_relaxed) < kClosed;
    arrive(open ? kClosed | kArrived : kArrived, barrier);
    phase_began_ = Clock::now();
    return;
  }
  const int cpu = current_cpu();
  note_core(cpu);
  if (drop_late_.load(std::memory_order_acquire)) {
    arrive(-kMember, barrier);
    throw Dropped{};
  }
  arrive(kArrived, barrier);
  if (++barriers_passed % kMoveEvery == 0 && core_is_shared(cpu)) move_to_free_core();
}

// Tells the other threads which core this one is on; writes only changes, to keep the cache line shared.
void ThreadPool::note_core(int cpu) {
  std::atomic<int>& noted = per_thread_[self].cpu;
  if (noted.load(std::memory_order_relaxed) != cpu) noted.store(cpu, std::memory_order_relaxed);
}

// At the first barrier of a job the caller waits a moment for workers that have not joined yet, except at its end.
void ThreadPool::wait_for_workers(bool last) {
  if (threads_ == 1) return;
  const int cpu = current_cpu();
  note_core(cpu);
  const auto missing = [&] {
    const uint64_t state = state_.load(std::memory_order_acquire);
    return state < kClosed && static_cast<int>(state / kMember) < threads_;
  };
  if (last || !missing()) return;
  const Clock::time_point now = Clock::now(), end = now + std::max<Clock::duration>(kMinWait, now - phase_began_);
  while (missing()) {
    if (Clock::now() > end) return back_off(Clock::now() - now);
    for (int i = 0; i < kPausesPerCheck; i++) pause();
    if (core_is_shared(cpu)) std::this_thread::yield();
  }
}

// Adds this thread's arrival at the barrier and waits for the others; or removes its membership and returns.
void ThreadPool::arrive(uint64_t change, uint32_t barrier) {
  const uint64_t state = state_.fetch_add(change, std::memory_order_acq_rel) + change;
  if (complete(state)) return release(state);
  if (change == -kMember) return;
  const auto shared = [cpu = current_cpu(), this] { return core_is_shared(cpu); };
  if (self) return barrier_.wait_past(barrier, kBarrierYields, shared, [] {});
  // Workers have had the caller's working time, so they should arrive soon. Yielding now could cost a whole time slice
  // of another process.
  const Clock::time_point now = Clock::now(), end = now + std::max<Clock::duration>(kMinWait, now - phase_began_);
  while (barrier_.value() == barrier && Clock::now() < end && !shared())
    for (int i = 0; i < kPausesPerCheck; i++) pause();
  barrier_.wait_past(barrier, kBarrierYields, shared, [&] {
    if (drop_late_.load(std::memory_order_relaxed) || barrier_.value() != barrier || Clock::now() < end) return;
    drop_late_.store(true, std::memory_order_release);
  });
  if (!drop_late_.load(std::memory_order_relaxed)) return;
  drop_late_.store(false, std::memory_order_relaxed);
  back_off(Clock::now() - now);
}

// The last thread to arrive starts the next phase. No thread is inside `parallel_for` now.
void ThreadPool::release(uint64_t state) {
  for (PerThread& entry : per_thread_) entry.taken.store(0, std::memory_order_relaxed);
  state_.store(state - (state & kCount), std::memory_order_release);
  barrier_.advance();
}

// The caller has waited in vain. It works alone for a while if that is quicker: two threads that lose half of their time
// by waiting do as much as one. A neighbour that takes the core now and then costs less than the worker's help is worth.
void ThreadPool::back_off(Clock::duration lost) {
  const Clock::time_point now = Clock::now();
  const Clock::duration helped = shared_time_ + (now - job_began_) - lost;
  shared_time_ = {};
  job_began_ = now;
  if (lost > helped) alone_until_ = now + std::min<Clock::duration>(kBackOff * lost, kMaxBackOff);
}

// Workers that share a core with another thread of the pool move to a free one. Without this, two threads that yield to
// each other may stay on one core forever. The caller's thread belongs to the application and is never moved.
void ThreadPool::move_to_free_core() {
#if defined(__linux__)
  for (int core : cores_) {
    if (core_is_shared(core)) continue;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
    per_thread_[self].cpu.store(core, std::memory_order_relaxed);
    return;
  }
#endif
}

// Whether another thread of the pool was last seen on this core: spinning would keep the core from the thread that is
// waited for.
bool ThreadPool::core_is_shared(int cpu) const {
  for (int thread = 0; thread < threads_; thread++)
    if (thread != self && per_thread_[thread].cpu.load(std::memory_order_relaxed) == cpu) return true;
  return false;
}

int ThreadPool::default_threads() {
  int available = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) available = std::max(1, CPU_COUNT(&set));
#endif
  if (const char* wanted = std::getenv("OUTRIDER_THREADS"); wanted && *wanted) {
    const int limit = std::atoi(wanted);
    if (limit > 0) available = std::min(available, limit);
  }
  return available;
}

namespace {

std::mutex pool_mutex;
std::shared_ptr<ThreadPool>* pool = nullptr;  // never destroyed: workers must not outlive statics they use

// A forked child process has none of the parent's threads: it must make a new pool.
void forget_pool() { pool = nullptr; }

}  // namespace

std::shared_ptr<ThreadPool> shared_pool() {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  if (!pool) {
#if defined(__linux__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    pool = new std::shared_ptr<ThreadPool>(std::make_shared<ThreadPool>(ThreadPool::default_threads()));
  }
  return *pool;
}

void set_threads(int threads) {
  shared_pool();
  auto replacement = std::make_shared<ThreadPool>(threads);
  const std::lock_guard<std::mutex> lock(pool_mutex);
  pool->swap(replacement);
}

}  // namespace outrider
