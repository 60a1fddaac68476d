#include "pool.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace glocal {
namespace {

struct Job {
  const std::function<void(int)>* fn;
  int tasks, grain;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex mutex;

  void work() {
    for (;;) {
      int begin = next.fetch_add(grain);
      if (begin >= tasks) return;
      for (int t = begin; t < std::min(begin + grain, tasks); ++t) {
        // Tasks that wait for a turn must all run, so a failure does not stop the others.
        try {
          (*fn)(t);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    }
  }
};

class Pool {
 public:
  bool run(int threads, Job& job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while ((int)workers_.size() < threads - 1) workers_.emplace_back(&Pool::loop, this, (int)workers_.size());
      job_ = &job;
      wanted_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    job.work();
    // All tasks are taken: a thread that has not woken by now is not waited for.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [&] { return busy_ == 0; });
    return true;
  }

 private:
  void loop(int index) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (index >= wanted_ || !job_) continue;
        job = job_;
        ++busy_;
      }
      job->work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, busy_ = 0;
  uint64_t round_ = 0;
};

// Threads do not survive a fork: a child starts a pool of its own, and never touches the locks of its parent's.
// Pools are not freed, because threads may outlive the module.
Pool& pool() {
  static std::atomic<Pool*> now{nullptr};
  static std::atomic<int> owner{0};
  int me = (int)getpid();
  if (owner.load() != me || !now.load()) {
    now.store(new Pool);
    owner.store(me);
  }
  return *now.load();
}

// The OpenMP runtime that torch has already loaded into this process, if it is GNU's. Its threads spin for a while after
// each of torch's own operations: threads of ours beside them would have to share their cores.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
#if defined(__linux__)
  void* found = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (!info->dlpi_name || !std::strstr(info->dlpi_name, "libgomp")) return 0;
        void* library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
        *(void**)out = library ? dlsym(library, "GOMP_parallel") : nullptr;
        return 1;
      },
      &found);
  return (GompParallel)found;
#else
  return nullptr;
#endif
}

bool run_on_gomp(int threads, Job& job) {
  static const GompParallel gomp = find_gomp();
  static const int owner = (int)getpid();  // after a fork its threads are gone, and it does not know
  if (!gomp || owner != (int)getpid()) return false;
  gomp([](void* data) { ((Job*)data)->work(); }, &job, (unsigned)threads, 0);
  return true;
}

}  // namespace

void parallel(int threads, int tasks, int grain, const std::function<void(int)>& fn) {
  if (tasks <= 0) return;
  Job job;
  job.fn = &fn;
  job.tasks = tasks;
  job.grain = std::max(grain, 1);
  threads = std::min(threads, (tasks + job.grain - 1) / job.grain);
  if (threads <= 1 || !(run_on_gomp(threads, job) || pool().run(threads, job))) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace glocal
