#include "team.h"

#include <chrono>
#include <csignal>

#include <pthread.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynskip {

namespace {

constexpr std::chrono::microseconds kMostSpinning{50};
constexpr int kSpinsBetweenLooks = 16;
// Of the word that says who is in a run.
constexpr uint64_t kIsOver = uint64_t{1} << 31;
constexpr uint64_t kNumInside = kIsOver - 1;

uint32_t run_of(uint64_t door) {
  return static_cast<uint32_t>(door >> 32);
}

// Leads a thread out of a run that ended while it slept.
struct HasOverslept {};

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

} // namespace

template <typename Ready>
bool Team::spin_until(const Ready& ready) {
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kSpinsBetweenLooks; ++i) {
      if (ready()) {
        return true;
      }
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() - begin < kMostSpinning);
  return false;
}

template <typename Ready>
void Team::sleep_until(const Ready& ready) {
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

Team::Team(int64_t num_members) : size_(num_members), process_(getpid()), door_(kIsOver) {
  // Signals are for the threads of the program, not for these.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int64_t index = 1; index < num_members; ++index) {
    threads_.emplace_back([this, index] { work_until_stopped(index); });
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Team::~Team() {
  stops_.store(true);
  wake();
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

bool Team::was_forked() const {
  return getpid() != process_;
}

void Team::run(const std::function<void(Member&)>& work) {
  if (was_forked()) {
    size_ = 1;
  }
  Member caller = {0, 0, 0};
  if (size_ == 1) {
    work(caller);
    return;
  }
  work_ = &work;
  next_task_.store(0);
  door_.store(uint64_t{run_of(door_.load()) + 1} << 32);
  wake();
  work(caller);
  door_.fetch_or(kIsOver);
  wake(); // who sleeps in the run is not in it, and may forget it
  const auto is_empty = [&] { return (door_.load() & kNumInside) == 0; };
  if (!spin_until(is_empty)) {
    sleep_until(is_empty);
  }
}

bool Team::enter(Member& member) {
  uint64_t door = door_.load();
  while (run_of(door) == member.run && (door & kIsOver) == 0) {
    if (door_.compare_exchange_weak(door, door + 1)) {
      return true;
    }
  }
  return false;
}

void Team::leave() {
  if ((door_.fetch_sub(1) & (kIsOver | kNumInside)) == (kIsOver | 1)) {
    wake();
  }
}

void Team::end_phase(Member& member, int64_t num_tasks, int64_t num_done) {
  if (num_done > 0 && num_done_.fetch_add(num_done) + num_done == num_tasks) {
    num_done_.store(0);
    next_task_.store(uint64_t{++member.phase} << 32);
    wake();
    return;
  }
  const auto has_ended = [&] { return next_task_.load() >> 32 != member.phase; };
  if (!spin_until(has_ended)) {
    if (member.index == 0) {
      sleep_until(has_ended);
    } else {
      leave();
      sleep_until([&] {
        const uint64_t door = door_.load();
        return run_of(door) != member.run || (door & kIsOver) != 0 || has_ended();
      });
      if (!enter(member)) {
        throw HasOverslept();
      }
    }
  }
  ++member.phase;
}

void Team::work_until_stopped(int64_t index) {
  for (Member member = {index, 0, 0};;) {
    uint64_t door = 0;
    const auto has_work = [&] {
      door = door_.load();
      return stops_.load() || (run_of(door) != member.run && (door & kIsOver) == 0);
    };
    if (!spin_until(has_work)) {
      sleep_until(has_work);
    }
    if (stops_.load()) {
      return;
    }
    member = {index, run_of(door), 0};
    if (!enter(member)) {
      continue;
    }
    try {
      (*work_)(member);
      leave();
    } catch (const HasOverslept&) {
    }
  }
}

} // namespace dynskip
