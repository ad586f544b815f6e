// The library's own threads. One parallel loop runs at a time; its items are handed out one after the other, and which
// thread takes which never changes a result: every item writes what no other item reads.
#pragma once

#include <cstdint>
#include <functional>

// A function that Python calls: `extern "C" EXPORT`.
#define EXPORT __attribute__((visibility("default")))

namespace pool {

int num_threads();

// Runs body(item) for item in [0, num_items), on the calling thread and the pool's. Returns when all are done.
void run(int64_t num_items, const std::function<void(int64_t)>& body);

template <class Body>
void parallel_for(int64_t num_items, Body&& body) {
    if (num_items == 1 || num_threads() == 1) {
        for (int64_t item = 0; item < num_items; ++item) body(item);
        return;
    }
    run(num_items, std::ref(body));
}

}  // namespace pool
