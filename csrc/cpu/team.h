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
class Team {
 public:
  explicit Team(int64_t num_members);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t size() const {
    return size_;
  }

  // Calls work(member) for each member, member 0 on the calling thread, and returns once all have returned.
  void run(const std::function<void(int64_t)>& work);

  // Waits until all members have come here; only inside of work, where all call it equally often. Tasks begin anew.
  void wait();

  // The next task of the phase that no member has taken: 0, 1, ...
  int64_t next_task() {
    return next_task_.fetch_add(1, std::memory_order_relaxed);
  }

  // Whether the process was forked since: a child has none of the threads, and may only leave the team as it is.
  bool was_forked() const;

 private:
  void work_until_stopped(int64_t member);

  template <typename Ready>
  void wait_until(const Ready& ready);
  void wake();

  int64_t size_;
  int64_t process_;
  std::vector<std::thread> threads_;
  const std::function<void(int64_t)>* work_ = nullptr;
  bool stops_ = false;
  alignas(64) std::atomic<uint32_t> num_runs_{0};
  alignas(64) std::atomic<int64_t> next_task_{0};
  alignas(64) std::atomic<int64_t> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> num_phases_{0};
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
