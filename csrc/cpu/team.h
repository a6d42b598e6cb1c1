// Threads that work on one thing together, phase by phase.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dynskip {

// The calling thread and some of its own, which live as long as the team. Who waits, for work or for the others, spins for
// up to 50 us and sleeps then.
//
// A phase ends with its last task, not with its last thread: one whose core another process has taken is waited for only
// where it was stopped within a task, and the others do what it would have done.
class Team {
 public:
  // A thread on its way through the phases of a run.
  struct Member {
    int64_t index; // 0 for the calling thread
    uint32_t run;
    uint32_t phase;
  };

  explicit Team(int64_t num_members);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t size() const {
    return size_;
  }

  // Calls work for the calling thread, and for each other that comes before that has ended; returns once all have ended. All
  // go through the same phases with as many tasks. One that has slept until the run's end is led out by an exception, so
  // work must leave nothing undone then.
  void run(const std::function<void(Member&)>& work);

  // A phase: calls task(i) for each i in 0..num_tasks - 1, once, on the thread that takes it first; returns at its end.
  template <typename Task>
  void for_each_task(Member& member, int64_t num_tasks, Task&& task) {
    if (size_ == 1) {
      for (int64_t i = 0; i < num_tasks; ++i) {
        task(i);
      }
      return;
    }
    if (num_tasks == 0) {
      return;
    }
    int64_t num_done = 0;
    uint64_t next = next_task_.load();
    while (next >> 32 == member.phase && static_cast<int64_t>(next & UINT32_MAX) < num_tasks) {
      if (next_task_.compare_exchange_weak(next, next + 1)) {
        task(static_cast<int64_t>(next & UINT32_MAX));
        ++num_done;
        next = next_task_.load();
      }
    }
    end_phase(member, num_tasks, num_done);
  }

  // Whether the process was forked since: a child has none of the threads, and may only leave the team as it is.
  bool was_forked() const;

 private:
  void work_until_stopped(int64_t index);
  bool enter(Member& member);
  void leave();
  void end_phase(Member& member, int64_t num_tasks, int64_t num_done);

  template <typename Ready>
  bool spin_until(const Ready& ready);
  template <typename Ready>
  void sleep_until(const Ready& ready);
  void wake();

  int64_t size_;
  int64_t process_;
  std::vector<std::thread> threads_;
  const std::function<void(Member&)>* work_ = nullptr;
  std::atomic<bool> stops_{false};
  alignas(64) std::atomic<uint64_t> door_; // number of the run, whether it is over, how many of the own threads are in it
  alignas(64) std::atomic<uint64_t> next_task_{0}; // phase of the run, its first task that nobody has taken
  alignas(64) std::atomic<int64_t> num_done_{0}; // tasks of the phase
  alignas(64) std::atomic<int32_t> num_sleeping_{0};
  std::mutex mutex_;
  std::condition_variable woken_;
};

struct EndTeam {
  void operator()(Team* team) const {
    // In a child its condition variable would wait for threads that are not there.
    if (!team->was_forked()) {
      delete team;
    }
  }
};

} // namespace dynskip
