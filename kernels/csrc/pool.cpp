#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// How often a thread looks before it sleeps: some tens of microseconds, the gap between two operations of a step. Between
// steps the threads sleep, so that workers that share a machine don't take each other's cores.
constexpr int NUM_SPINS = 4000;

// Spins while `is_over` does not hold, then sleeps on `word` as long as it is `seen`.
template <class Condition>
void await(const std::atomic<uint32_t>& word, uint32_t seen, const Condition& is_over) {
    for (int spin = 0; spin < NUM_SPINS; ++spin) {
        if (is_over()) return;
        _mm_pause();
    }
    word.wait(seen);
}

// A loop ends when its items are done, not when every thread has taken part: where the machine is busy and a helper gets
// no core in time, the caller does its share. So a helper may wake up late, in the middle of a later loop. It takes an
// item only by moving `ticket_` on from a value of the round that it knows, and while an item is taken its round can't
// end: what it has read of the round is then still true.
class Pool {
  public:
    void resize(int num_threads, const int32_t* cpus, int num_cpus) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        stop();
        stopping_.store(false);
        size_.store(num_threads);
        for (int i = 1; i < num_threads; ++i) {
            helpers_.emplace_back([this, seen = round_.load()] { help(seen); });
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
        const uint32_t round = round_.load(std::memory_order_relaxed) + 1;
        ticket_.store((uint64_t{round} << 32) | UINT32_MAX);  // nothing to take while the round is being described
        num_left_.store(static_cast<uint32_t>(num_items), std::memory_order_relaxed);
        num_items_.store(num_items, std::memory_order_release);
        body_.store(&body, std::memory_order_release);
        ticket_.store(uint64_t{round} << 32, std::memory_order_release);
        round_.store(round);
        round_.notify_all();
        take_items(round);
        for (uint32_t left = num_left_.load(std::memory_order_acquire); left > 0; left = num_left_.load(std::memory_order_acquire))
            await(num_left_, left, [&] { return num_left_.load(std::memory_order_acquire) != left; });
    }

  private:
    void take_items(uint32_t round) {
        for (uint64_t ticket = ticket_.load(std::memory_order_acquire); ticket >> 32 == round;) {
            const int64_t item = static_cast<int64_t>(ticket & UINT32_MAX);
            const auto* body = body_.load(std::memory_order_acquire);
            if (item >= num_items_.load(std::memory_order_acquire)) return;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            (*body)(item);
            if (num_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) num_left_.notify_one();
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void help(uint32_t seen) {
        while (true) {
            while (round_.load() == seen) await(round_, seen, [&] { return round_.load(std::memory_order_acquire) != seen; });
            seen = round_.load();
            if (stopping_.load()) return;
            take_items(seen);
        }
    }

    void stop() {
        stopping_.store(true);
        ++round_;
        round_.notify_all();
        for (std::thread& helper : helpers_) helper.join();
        helpers_.clear();
    }

    std::mutex running_;
    std::vector<std::thread> helpers_;
    std::atomic<int> size_{1};
    std::atomic<uint32_t> round_{0}, num_left_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<uint64_t> ticket_{0};  // round in the high half, next item in the low
    std::atomic<int64_t> num_items_{0};
    std::atomic<const std::function<void(int64_t)>*> body_{nullptr};
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
