// The checksum of kernels/checksum.py in one pass over the bytes: additions, and one 32-bit multiplication a word.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "checksum.h"
#include "pool.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t CHUNK = 1 << 16;  // words
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;

using Words = int32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint32_t __attribute__((vector_size(4 * LANES)));
using Sums = int64_t __attribute__((vector_size(8 * LANES)));

// The high halves of the weights: splitmix64 (Steele, Lea & Flood, 2014) of the place in the chunk.
// The last ones stand for words that are missing.
const std::array<uint32_t, CHUNK + LANES>& high_halves() {
    static const std::array<uint32_t, CHUNK + LANES> halves = [] {
        std::array<uint32_t, CHUNK + LANES> made{};
        for (uint64_t j = 0; j < CHUNK; ++j) {
            uint64_t z = (j + 1) * GOLDEN;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
            made[j] = static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
        }
        return made;
    }();
    return halves;
}

// `__builtin_convertvector`, for which GCC takes more than one instruction; and a store of so many words past the
// caches, to where they are aligned.
#if defined(__AVX512F__)
Sums widened(Words words) { return reinterpret_cast<Sums>(_mm512_cvtepi32_epi64(reinterpret_cast<__m256i>(words))); }
void stream(char* to, const char* from) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
Sums widened(Words words) { return reinterpret_cast<Sums>(_mm256_cvtepi32_epi64(reinterpret_cast<__m128i>(words))); }
void stream(char* to, const char* from) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

enum class Copy { NONE, CACHED, STREAMED };

struct ChunkSums {
    uint64_t plain = 0;     // of the words
    uint64_t weighted = 0;  // of each word times its weight
};

// What some neighbouring words add to, lane by lane: the sum of the words, the sum of these sums, from which follows
// sum(step * word), and sum(half * word).
struct Lanes {
    Sums sums{}, sums_of_sums{};
    Halves high{};

    void add(const char* data, size_t num_bytes, const uint32_t* halves) {
        Words words{};
        Halves weights;
        std::memcpy(&words, data, num_bytes);
        std::memcpy(&weights, halves, sizeof weights);
        sums += widened(words);
        sums_of_sums += sums;
        high += reinterpret_cast<Halves&>(words) * weights;
    }

    ChunkSums total(int64_t num_steps) const {
        ChunkSums total;
        for (int lane = 0; lane < LANES; ++lane) {
            const uint64_t sum = static_cast<uint64_t>(sums[lane]);
            const uint64_t by_step = static_cast<uint64_t>(num_steps) * sum - static_cast<uint64_t>(sums_of_sums[lane]);
            total.plain += sum;
            total.weighted += 2 * (LANES * by_step + static_cast<uint64_t>(lane) * sum) + sum;
            total.weighted += static_cast<uint64_t>(high[lane]) << 32;
        }
        return total;
    }
};

// `data` may lie anywhere; what is missing of the last words counts as zero. Copied to `to` on the way, if at all.
template <Copy COPY>
ChunkSums sum_chunk(const char* data, int64_t num_bytes, const uint32_t* halves, char* to) {
    constexpr int64_t STEP = LANES * 4;
    const int64_t num_whole = num_bytes / STEP, rest = num_bytes % STEP;
    Lanes lanes;
    for (int64_t step = 0; step < num_whole; ++step) {
        lanes.add(data + step * STEP, STEP, halves + step * LANES);
        if constexpr (COPY == Copy::CACHED) std::memcpy(to + step * STEP, data + step * STEP, STEP);
        if constexpr (COPY == Copy::STREAMED) stream(to + step * STEP, data + step * STEP);
    }
    if (rest == 0) return lanes.total(num_whole);
    lanes.add(data + num_whole * STEP, static_cast<size_t>(rest), halves + num_whole * LANES);
    if constexpr (COPY != Copy::NONE) std::memcpy(to + num_whole * STEP, data + num_whole * STEP, static_cast<size_t>(rest));
    return lanes.total(num_whole + 1);
}

ChunkSums sum_chunk(const char* data, int64_t num_bytes, const uint32_t* halves, char* to, Copy copy) {
    if (copy == Copy::NONE) return sum_chunk<Copy::NONE>(data, num_bytes, halves, to);
    if (copy == Copy::CACHED || reinterpret_cast<uintptr_t>(to) % (LANES * 4) != 0)
        return sum_chunk<Copy::CACHED>(data, num_bytes, halves, to);
    return sum_chunk<Copy::STREAMED>(data, num_bytes, halves, to);
}

uint64_t sum_part(const char* data, int64_t offset, int64_t num_bytes, char* to, Copy copy) {
    const uint32_t* halves = high_halves().data();
    const int64_t end = offset + num_bytes;
    uint64_t total = 0;
    for (int64_t start = offset; start < end;) {
        const int64_t chunk = start / (4 * CHUNK), first = start / 4 % CHUNK;
        const int64_t size = std::min(end, (chunk + 1) * 4 * CHUNK) - start;
        ChunkSums sums = sum_chunk(data + (start - offset), size, halves + first, to + (start - offset), copy);
        sums.weighted += sums.plain * 2 * static_cast<uint64_t>(first);
        const uint64_t place = static_cast<uint64_t>(chunk);
        total += sums.weighted * (1 + (GOLDEN * place << 32)) + sums.plain * (2 * CHUNK * place);
        start += size;
    }
    return total;
}

}  // namespace

namespace checksum {

uint64_t of_size(int64_t num_bytes) { return static_cast<uint64_t>(num_bytes) * GOLDEN; }

uint64_t of_part(const char* data, int64_t offset, int64_t num_bytes) {
    return sum_part(data, offset, num_bytes, nullptr, Copy::NONE);
}

uint64_t copy_part(const char* from, char* to, int64_t offset, int64_t num_bytes, bool past_caches) {
    return sum_part(from, offset, num_bytes, to, past_caches ? Copy::STREAMED : Copy::CACHED);
}

}  // namespace checksum

extern "C" EXPORT uint64_t penstock_checksum(const char* data, int64_t num_bytes) {
    return checksum::of_size(num_bytes) + checksum::of_part(data, 0, num_bytes);
}
