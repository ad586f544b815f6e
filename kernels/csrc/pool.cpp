#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// How often an idle thread looks for work before it sleeps: some tens of microseconds, the gap between two operations
// of a step. Between steps the threads sleep, so that workers that share a machine don't take each other's cores.
constexpr int NUM_SPINS = 4000;

class Pool {
  public:
    ~Pool() { stop(); }

    void resize(int num_threads, const int32_t* cpus, int num_cpus) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        stop();
        stopping_.store(false);
        size_.store(num_threads);
        for (int i = 1; i < num_threads; ++i) {
            helpers_.emplace_back([this] { help(); });
            if (num_cpus > 0) {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(cpus[i % num_cpus], &set);
                pthread_setaffinity_np(helpers_.back().native_handle(), sizeof set, &set);
            }
        }
    }

    int size() const { return size_.load(std::memory_order_relaxed); }

    void run(int64_t num_items, const std::function<void(int64_t)>& body) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        body_ = &body;
        num_items_ = num_items;
        next_.store(0, std::memory_order_relaxed);
        num_busy_.store(static_cast<int>(helpers_.size()), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        if (num_asleep_.load() > 0) round_.notify_all();
        take_items();
        while (num_busy_.load(std::memory_order_acquire) > 0) _mm_pause();
    }

  private:
    void take_items() {
        for (int64_t item = next_++; item < num_items_; item = next_++) (*body_)(item);
    }

    void help() {
        for (uint32_t seen = 0;;) {
            seen = await_round(seen);
            if (stopping_.load()) return;
            take_items();
            num_busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    uint32_t await_round(uint32_t seen) {
        for (int spin = 0; spin < NUM_SPINS; ++spin) {
            const uint32_t now = round_.load(std::memory_order_acquire);
            if (now != seen) return now;
            _mm_pause();
        }
        ++num_asleep_;
        round_.wait(seen);
        --num_asleep_;
        return round_.load(std::memory_order_acquire);
    }

    void stop() {
        stopping_.store(true);
        ++round_;
        round_.notify_all();
        for (std::thread& helper : helpers_) helper.join();
        helpers_.clear();
        round_.store(0);
    }

    std::mutex running_;
    std::vector<std::thread> helpers_;
    std::atomic<int> size_{1};
    std::atomic<uint32_t> round_{0};
    std::atomic<int> num_asleep_{0}, num_busy_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<int64_t> next_{0};
    int64_t num_items_ = 0;
    const std::function<void(int64_t)>* body_ = nullptr;
};

// Never destroyed: at exit the threads may still sleep in it.
Pool& pool_of_this_process() {
    static Pool* pool = new Pool;
    return *pool;
}

}  // namespace

namespace pool {

int num_threads() { return pool_of_this_process().size(); }

void run(int64_t num_items, const std::function<void(int64_t)>& body) { pool_of_this_process().run(num_items, body); }

}  // namespace pool

// Helper thread i runs on cpus[i % num_cpus] alone; without cpus wherever the system puts it.
extern "C" EXPORT void penstock_set_num_threads(int32_t num_threads, const int32_t* cpus, int32_t num_cpus) {
    pool_of_this_process().resize(num_threads, cpus, num_cpus);
}

extern "C" EXPORT int32_t penstock_num_threads() { return pool::num_threads(); }
