#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// How often a thread looks before it sleeps: some tens of microseconds, the gap between two operations. Between steps the
// threads sleep, so that workers that share a machine don't take each other's cores. Within one, where Python has things
// to do between two calls, helpers look for up to some milliseconds: to wake up would take them longer than the gap.
constexpr int NUM_SPINS = 4000, NUM_SPINS_WITHIN_STEP = 100000;

// Spins while `is_over` does not hold, then sleeps on `word` as long as it is `seen`.
template <class Condition>
void await(const std::atomic<uint32_t>& word, uint32_t seen, int num_spins, const Condition& is_over) {
    for (int spin = 0; spin < num_spins; ++spin) {
        if (is_over()) return;
        _mm_pause();
    }
    word.wait(seen);
}

// The items of a loop that a thread has yet to take: [begin, end) of round `round`, in one word, so that nobody sees the
// one without the others. A thread that sleeps while 2^20 rounds go by and then finds the very same items left takes one
// of the round at hand, which is as good.
struct Share {
    static constexpr int64_t MAX_ITEMS = 1 << 22;
    uint32_t round, begin, end;

    static Share of(uint64_t word) {
        return {static_cast<uint32_t>(word >> 44), static_cast<uint32_t>(word >> 22) & 0x3fffff, static_cast<uint32_t>(word) & 0x3fffff};
    }
    uint64_t word() const { return (uint64_t{round & ROUND_MASK} << 44) | (uint64_t{begin} << 22) | end; }
    bool is_of(uint32_t other) const { return round == (other & ROUND_MASK); }
    static constexpr uint32_t ROUND_MASK = 0xfffff;
};

// Each thread has a share of a loop's items that lie side by side, so that it reads memory from front to back; once done,
// it takes from the back of others' shares. A loop ends when its items are done, not when every thread has taken part:
// where the machine is busy and a helper gets no core in time, the others do its share. So a helper may wake up late, in
// the middle of a later loop. It takes an item only by changing a share of the round that it knows, and while an item is
// taken its round can't end: what it has read of the round is then still true.
class Pool {
  public:
    void resize(int num_threads, const int32_t* cpus, int num_cpus) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        stop();
        stopping_.store(false);
        shares_ = std::vector<OwnLine>(static_cast<size_t>(num_threads));
        size_.store(num_threads);
        for (int i = 1; i < num_threads; ++i) {
            helpers_.emplace_back([this, i, seen = round_.load()] { help(i, seen); });
            if (num_cpus > 0) {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(cpus[i % num_cpus], &set);
                pthread_setaffinity_np(helpers_.back().native_handle(), sizeof set, &set);
            }
        }
    }

    // Helpers wake up when a step begins: in a round without items.
    void set_within_step(bool within_step) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        within_step_.store(within_step, std::memory_order_relaxed);
        if (!within_step) return;
        ++round_;
        round_.notify_all();
    }

    int size() const { return size_.load(std::memory_order_relaxed); }

    void run(int64_t num_items, const std::function<void(int64_t)>& body) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        for (int64_t start = 0; start < num_items; start += Share::MAX_ITEMS - 1)
            run_round(start, std::min(Share::MAX_ITEMS - 1, num_items - start), body);
    }

  private:
    struct alignas(64) OwnLine {
        std::atomic<uint64_t> word{0};
    };

    void run_round(int64_t first_item, int64_t num_items, const std::function<void(int64_t)>& body) {
        const uint32_t round = round_.load(std::memory_order_relaxed) + 1;
        first_item_.store(first_item, std::memory_order_relaxed);
        num_left_.store(static_cast<uint32_t>(num_items), std::memory_order_relaxed);
        body_.store(&body, std::memory_order_relaxed);
        const int64_t num_shares = size();
        for (int64_t i = 0; i < num_shares; ++i) {
            const Share share{round, static_cast<uint32_t>(num_items * i / num_shares), static_cast<uint32_t>(num_items * (i + 1) / num_shares)};
            shares_[static_cast<size_t>(i)].word.store(share.word(), std::memory_order_release);
        }
        round_.store(round);
        round_.notify_all();
        take_items(0, round);
        for (uint32_t left = num_left_.load(std::memory_order_acquire); left > 0; left = num_left_.load(std::memory_order_acquire))
            await(num_left_, left, NUM_SPINS, [&] { return num_left_.load(std::memory_order_acquire) != left; });
    }

    // All there is to take for the thread that owns share `own`.
    void take_items(size_t own, uint32_t round) {
        for (size_t i = 0; i < shares_.size(); ++i) {
            std::atomic<uint64_t>& word = shares_[(own + i) % shares_.size()].word;
            for (uint64_t seen = word.load(std::memory_order_acquire);;) {
                Share share = Share::of(seen);
                if (!share.is_of(round)) return;
                if (share.begin == share.end) break;
                const auto* body = body_.load(std::memory_order_acquire);
                const int64_t first_item = first_item_.load(std::memory_order_acquire);
                const uint32_t item = i == 0 ? share.begin++ : --share.end;
                if (!word.compare_exchange_weak(seen, share.word(), std::memory_order_acq_rel)) continue;
                (*body)(first_item + item);
                if (num_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) num_left_.notify_one();
                seen = word.load(std::memory_order_acquire);
            }
        }
    }

    void help(int own, uint32_t seen) {
        while (true) {
            while (round_.load() == seen) {
                const int num_spins = within_step_.load(std::memory_order_relaxed) ? NUM_SPINS_WITHIN_STEP : NUM_SPINS;
                await(round_, seen, num_spins, [&] { return round_.load(std::memory_order_acquire) != seen; });
            }
            seen = round_.load();
            if (stopping_.load()) return;
            take_items(static_cast<size_t>(own), seen);
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
    std::vector<OwnLine> shares_ = std::vector<OwnLine>(1);
    std::atomic<int> size_{1};
    std::atomic<uint32_t> round_{0}, num_left_{0};
    std::atomic<bool> stopping_{false}, within_step_{false};
    std::atomic<int64_t> first_item_{0};
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

// Between its beginning and its end, the threads of a step stay awake.
extern "C" EXPORT void penstock_set_within_step(int32_t within_step) { pool_of_this_process().set_within_step(within_step != 0); }

extern "C" EXPORT int32_t penstock_num_threads() { return pool::num_threads(); }
