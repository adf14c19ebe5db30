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

constexpr int kSpins = 2000;         // pauses before the first yield: tens of microseconds
constexpr int kLook = 32;            // pauses between looks at who shares this core
constexpr int kBarrierYields = 20;   // inside a job; on a busy machine each may cost a slice
constexpr int kMoveEvery = 16;       // barriers between looks at whether to change cores
constexpr int kIdleYields = 500;     // between jobs: another pass may follow at once

using std::chrono::microseconds;
using std::chrono::milliseconds;
constexpr microseconds kPatience{150};    // the least the caller waits for a worker before it lets it go
constexpr int kWorth = 16;                // waiting in vain may take one part in so many of all time
constexpr milliseconds kLongestRest{1000};

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

thread_local int self = 0;           // number of this thread in the job it runs
thread_local unsigned meetings = 0;  // barriers this thread has passed

}  // namespace

void Epoch::advance() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) value_.notify_all();
}

template <class Crowded, class Tired>
void Epoch::wait_past(uint32_t seen, int yields, Crowded&& crowded, Tired&& tired) {
  for (int i = 1; i <= kSpins; i++) {
    if (value() != seen) return;
    pause();
    if (i % kLook == 0 && crowded()) break;
  }
  for (int i = 0; i < yields; i++) {
    tired();
    if (value() != seen) return;
    std::this_thread::yield();
  }
  tired();
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == seen) value_.wait(seen, std::memory_order_seq_cst);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)), places_(threads_) {
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
    job_.wait_past(seen, kIdleYields, [this] { return crowded(current_cpu()); }, [] {});
    if (stop_) return;
    seen = job_.value();
    if (!join()) continue;
    try {
      call_(context_, thread);
      meet(true);
    } catch (const Dismissed&) {
    }
  }
}

void ThreadPool::run_raw(Call call, void* context) {
  const std::lock_guard<std::mutex> lock(one_job_);
  self = 0;
  call_ = call;
  context_ = context;
  impatient_.store(false, std::memory_order_relaxed);
  for (Place& place : places_) place.taken.store(0, std::memory_order_relaxed);
  const Clock::time_point began = phase_began_ = Clock::now();
  const bool alone = threads_ == 1 || began < alone_until_;
  state_.store(alone ? kClosed | kMember : kMember, std::memory_order_release);
  if (!alone) job_.advance();
  call(context, 0);
  meet(true);
  if (!alone) together_ += phase_began_ - began;
}

// Takes part in the job, if it still takes anybody.
bool ThreadPool::join() {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (state < kClosed)
    if (state_.compare_exchange_weak(state, state + kMember, std::memory_order_acq_rel)) return true;
  return false;
}

void ThreadPool::meet(bool last) {
  const uint32_t meeting = meeting_.value();
  if (self == 0) {
    wait_for_workers(last);
    const bool open = state_.load(std::memory_order_relaxed) < kClosed;
    arrive(open ? kClosed | kArrived : kArrived, meeting);
    phase_began_ = Clock::now();
    return;
  }
  const int cpu = current_cpu();
  if (places_[self].cpu.load(std::memory_order_relaxed) != cpu) places_[self].cpu.store(cpu, std::memory_order_relaxed);
  if (impatient_.load(std::memory_order_acquire)) {
    arrive(-kMember, meeting);
    throw Dismissed{};
  }
  arrive(kArrived, meeting);
  if (++meetings % kMoveEvery == 0 && crowded(cpu)) move_away();
}

// The caller came to its job's first barrier: workers that have not begun get a moment, unless nothing is left to do.
void ThreadPool::wait_for_workers(bool last) {
  if (threads_ == 1) return;
  const int cpu = current_cpu();
  if (places_[0].cpu.load(std::memory_order_relaxed) != cpu) places_[0].cpu.store(cpu, std::memory_order_relaxed);
  const auto missing = [&] {
    const uint64_t state = state_.load(std::memory_order_acquire);
    return state < kClosed && static_cast<int>(state / kMember) < threads_;
  };
  if (last || !missing()) return;
  const Clock::time_point now = Clock::now(), end = now + std::max<Clock::duration>(kPatience, now - phase_began_);
  while (missing()) {
    if (Clock::now() > end) return rest(Clock::now() - now);
    for (int i = 0; i < kLook; i++) pause();
    if (crowded(cpu)) std::this_thread::yield();
  }
}

// Adds one's arrival, or takes away one's membership, and waits for the others unless it leaves.
void ThreadPool::arrive(uint64_t change, uint32_t meeting) {
  const uint64_t state = state_.fetch_add(change, std::memory_order_acq_rel) + change;
  if (complete(state)) return release(state);
  if (change == -kMember) return;
  const auto crowd = [cpu = current_cpu(), this] { return crowded(cpu); };
  if (self) return meeting_.wait_past(meeting, kBarrierYields, crowd, [] {});
  // Whoever has worked as long as the caller should be here soon. To yield now could cost a neighbour's whole slice.
  const Clock::time_point now = Clock::now(), end = now + std::max<Clock::duration>(kPatience, now - phase_began_);
  while (meeting_.value() == meeting && Clock::now() < end && !crowd())
    for (int i = 0; i < kLook; i++) pause();
  meeting_.wait_past(meeting, kBarrierYields, crowd, [&] {
    if (impatient_.load(std::memory_order_relaxed) || meeting_.value() != meeting || Clock::now() < end) return;
    impatient_.store(true, std::memory_order_release);
  });
  if (!impatient_.load(std::memory_order_relaxed)) return;
  impatient_.store(false, std::memory_order_relaxed);
  rest(Clock::now() - now);
}

// The last to arrive lets all go on. Nobody is in `deal` now.
void ThreadPool::release(uint64_t state) {
  for (Place& place : places_) place.taken.store(0, std::memory_order_relaxed);
  state_.store(state - (state & kCount), std::memory_order_release);
  meeting_.advance();
}

// The caller has waited in vain: it works alone until the loss is small beside the time since the last one.
void ThreadPool::rest(Clock::duration lost) {
  const Clock::duration wanted = kWorth * lost - together_;
  together_ = {};
  if (wanted.count() > 0) alone_until_ = Clock::now() + std::min<Clock::duration>(wanted, kLongestRest);
}

// Workers that have shared a core for a while go to one that no thread of the pool is on; the caller's own thread is
// not ours to move. Without this, two threads that politely yield to each other may stay on one core for good.
void ThreadPool::move_away() {
#if defined(__linux__)
  for (int core : cores_) {
    if (crowded(core)) continue;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
    places_[self].cpu.store(core, std::memory_order_relaxed);
    return;
  }
#endif
}

// A scheduler may put two of our threads on one core: spinning there keeps out the very thread that is waited for.
bool ThreadPool::crowded(int cpu) const {
  for (int thread = 0; thread < threads_; thread++)
    if (thread != self && places_[thread].cpu.load(std::memory_order_relaxed) == cpu) return true;
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

// A forked child has none of the parent's threads: it starts over with a pool of its own.
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
