#include "team.h"

#include <chrono>
#include <csignal>

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynskip {

namespace {

constexpr std::chrono::microseconds kMostSpinning{50};
constexpr int kSpinsBetweenLooks = 16;

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Asks the kernel for short turns, which Linux grants since 6.12: a thread with work for some microseconds is then not kept
// waiting by another process until that has had its own turn of milliseconds. Older kernels ignore it. Not for the calling
// thread, which is not ours.
void ask_for_short_turns() {
#if defined(__linux__)
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes = {};
  attributes.size = sizeof(attributes);
  const int kept = syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0);
  if (kept == 0 && attributes.policy == SCHED_OTHER) {
    attributes.runtime = 100000; // ns, the shortest
    syscall(SYS_sched_setattr, 0, &attributes, 0);
  }
#endif
}

} // namespace

template <typename Ready>
void Team::wait_until(const Ready& ready) {
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kSpinsBetweenLooks; ++i) {
      if (ready()) {
        return;
      }
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() - begin < kMostSpinning);
  std::unique_lock<std::mutex> lock(mutex_);
  // Sequentially consistent, as what wakes is: either this thread sees what it waits for, or is seen to sleep.
  num_sleeping_.fetch_add(1);
  woken_.wait(lock, ready);
  num_sleeping_.fetch_sub(1);
}

void Team::wake() {
  if (num_sleeping_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_.notify_all();
  }
}

Team::Team(int64_t num_members) : size_(num_members), process_(getpid()) {
  // Signals are for the threads of the program, not for these.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int64_t member = 1; member < num_members; ++member) {
    threads_.emplace_back([this, member] { work_until_stopped(member); });
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Team::~Team() {
  stops_ = true;
  num_runs_.fetch_add(1);
  wake();
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

bool Team::was_forked() const {
  return getpid() != process_;
}

void Team::run(const std::function<void(int64_t)>& work) {
  if (was_forked()) {
    size_ = 1;
  }
  next_task_.store(0, std::memory_order_relaxed);
  if (size_ > 1) {
    work_ = &work;
    num_runs_.fetch_add(1);
    wake();
  }
  work(0);
  wait();
}

void Team::wait() {
  if (size_ == 1) {
    next_task_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = num_phases_.load();
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    num_arrived_.store(0, std::memory_order_relaxed);
    next_task_.store(0, std::memory_order_relaxed);
    num_phases_.store(phase + 1);
    wake();
    return;
  }
  wait_until([&] { return num_phases_.load() != phase; });
}

void Team::work_until_stopped(int64_t member) {
  ask_for_short_turns();
  for (uint32_t num_done = 0;;) {
    wait_until([&] { return num_runs_.load() != num_done; });
    ++num_done;
    if (stops_) {
      return;
    }
    (*work_)(member);
    wait();
  }
}

} // namespace dynskip
