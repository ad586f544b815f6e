// Payloads out of the paged cache of one layer and back, block by block, each with its part of the checksum while it is
// in the core's cache. A payload is K [T, K, D], then V [T, K, D], then their float scales [T, K] each; a latent cache
// has but V, of one head. One "by blocks" has these for one block after the other, and of whole blocks as the cache has
// them, so that nothing is transposed.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "checksum.h"
#include "pool.h"

// Mirrored by `Arguments` of kernels/kv_copy.py.
struct KVCopyArguments {
    char *k, *v, *k_scale, *v_scale;  // [B, K, D, S], [B, K, S, D], [B, K, S] twice; absent ones are null
    const int32_t* blocks;
    char* payload;
    int64_t start;  // position of the first token, counted from the first of `blocks`
    int64_t num_tokens, block_size, head_size;
    int64_t num_heads, first_head, num_cache_heads;  // of the payload, which are some of the cache's
    int32_t item_bytes, parallel, by_blocks;
    int32_t past_caches;  // what is scattered by blocks is too much to stay in the caches
};

namespace {

template <class T>
__m128i interleave_low(__m128i a, __m128i b) {
    if constexpr (sizeof(T) == 1) return _mm_unpacklo_epi8(a, b);
    if constexpr (sizeof(T) == 2) return _mm_unpacklo_epi16(a, b);
    return _mm_unpacklo_epi32(a, b);
}

template <class T>
__m128i interleave_high(__m128i a, __m128i b) {
    if constexpr (sizeof(T) == 1) return _mm_unpackhi_epi8(a, b);
    if constexpr (sizeof(T) == 2) return _mm_unpackhi_epi16(a, b);
    return _mm_unpackhi_epi32(a, b);
}

// to[c][r] = from[r][c] for a square that is a vector wide: log2(N) rounds in which the upper half of the rows is
// interleaved with the lower.
template <class T>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    constexpr int N = 16 / sizeof(T);
    __m128i rows[N], mixed[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
#pragma GCC unroll 4
    for (int round = 1; round < N; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; ++i) {
            mixed[2 * i] = interleave_low<T>(rows[i], rows[i + N / 2]);
            mixed[2 * i + 1] = interleave_high<T>(rows[i], rows[i + N / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = mixed[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), rows[i]);
}

// to[c][r] = from[r][c]. The side whose rows lie far apart is walked along its rows: those of a payload are often a
// power of two apart, and only a few such lines fit into a core's cache.
template <class T, bool ALONG_TO>
void transpose(const T* from, int64_t from_stride, int64_t num_rows, int64_t num_columns, T* to, int64_t to_stride) {
    constexpr int64_t N = 16 / sizeof(T);
    const int64_t whole_rows = num_rows / N * N, whole_columns = num_columns / N * N;
    const auto tile = [&](int64_t r, int64_t c) {
        transpose_tile(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    };
    if constexpr (ALONG_TO) {
        for (int64_t c = 0; c < whole_columns; c += N)
            for (int64_t r = 0; r < whole_rows; r += N) tile(r, c);
    } else {
        for (int64_t r = 0; r < whole_rows; r += N)
            for (int64_t c = 0; c < whole_columns; c += N) tile(r, c);
    }
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < num_columns; ++c)
            to[c * to_stride + r] = from[r * from_stride + c];
}

// Tokens [offset, offset + num_tokens) of one block, which are tokens [token, ...) of the payload.
struct Piece {
    int64_t block, offset, token, num_tokens;
};

// Which [D, S] or [S, D] of the cache holds a head of the piece.
int64_t place(const KVCopyArguments& a, const Piece& piece, int64_t head) {
    return piece.block * a.num_cache_heads + a.first_head + head;
}

// What the payload holds of one tensor: `row_bytes` a token from `offset` on.
struct Plane {
    char* cache;
    int64_t offset, row_bytes;
};

template <class T, bool GATHER>
void copy_columns(const KVCopyArguments& a, const Plane& plane, const Piece& piece) {
    T* const cache = reinterpret_cast<T*>(plane.cache);
    T* const payload = reinterpret_cast<T*>(a.payload + plane.offset + piece.token * plane.row_bytes);
    const int64_t stride = a.num_heads * a.head_size;
    for (int64_t head = 0; head < a.num_heads; ++head) {
        T* columns = cache + place(a, piece, head) * a.head_size * a.block_size + piece.offset;
        T* rows = payload + head * a.head_size;
        if constexpr (GATHER) transpose<T, true>(columns, a.block_size, a.head_size, piece.num_tokens, rows, stride);
        else transpose<T, false>(rows, stride, piece.num_tokens, a.head_size, columns, a.block_size);
    }
}

template <bool GATHER>
void copy_rows(const KVCopyArguments& a, const Plane& plane, const Piece& piece) {
    const int64_t size = plane.row_bytes / a.num_heads;
    for (int64_t head = 0; head < a.num_heads; ++head) {
        char* cache = plane.cache + (place(a, piece, head) * a.block_size + piece.offset) * size;
        char* payload = a.payload + plane.offset + piece.token * plane.row_bytes + head * size;
        for (int64_t i = 0; i < piece.num_tokens; ++i, cache += size, payload += plane.row_bytes) {
            if constexpr (GATHER) std::memcpy(payload, cache, static_cast<size_t>(size));
            else std::memcpy(cache, payload, static_cast<size_t>(size));
        }
    }
}

template <bool GATHER>
void copy_k(const KVCopyArguments& a, const Plane& plane, const Piece& piece) {
    switch (a.item_bytes) {
        case 1: return copy_columns<uint8_t, GATHER>(a, plane, piece);
        case 2: return copy_columns<uint16_t, GATHER>(a, plane, piece);
        default: return copy_columns<uint32_t, GATHER>(a, plane, piece);
    }
}

// A part of the payload that is the same bytes as in the cache; returns what it adds to the checksum.
template <bool GATHER>
uint64_t copy_bytes(const KVCopyArguments& a, char* cache, int64_t offset, int64_t num_bytes) {
    if (GATHER) return checksum::copy_part(cache, a.payload + offset, offset, num_bytes, false);
    return checksum::copy_part(a.payload + offset, cache, offset, num_bytes, a.past_caches != 0);
}

template <bool GATHER>
uint64_t copy_piece(const KVCopyArguments& a, const Plane& plane, const Piece& piece, bool by_parts) {
    const int64_t first = plane.offset + piece.token * plane.row_bytes, size = piece.num_tokens * plane.row_bytes;
    uint64_t sum = 0;
    if (!GATHER && by_parts) sum = checksum::of_part(a.payload + first, first, size);
    if (plane.cache == a.k) copy_k<GATHER>(a, plane, piece);
    else copy_rows<GATHER>(a, plane, piece);
    if (GATHER && by_parts) sum = checksum::of_part(a.payload + first, first, size);
    return sum;
}

template <bool GATHER>
uint64_t copy(const KVCopyArguments& a) {
    const int64_t vector_bytes = a.num_heads * a.head_size * a.item_bytes, scale_bytes = a.num_heads * 4;
    const Plane planes[] = {{a.k, 0, vector_bytes}, {a.v, 0, vector_bytes}, {a.k_scale, 0, scale_bytes}, {a.v_scale, 0, scale_bytes}};
    int64_t token_bytes = 0;
    for (const Plane& plane : planes)
        if (plane.cache != nullptr) token_bytes += plane.row_bytes;
    const bool by_parts = vector_bytes % 4 == 0;  // else a part may begin within a word
    std::atomic<uint64_t> total = checksum::of_size(a.num_tokens * token_bytes);
    if (!GATHER && !by_parts) total += checksum::of_part(a.payload, 0, a.num_tokens * token_bytes);
    const int64_t last = a.start + a.num_tokens, num_blocks = (last + a.block_size - 1) / a.block_size;
    const auto copy_block = [&](int64_t i) {
        const int64_t begin = std::max(a.start, i * a.block_size), end = std::min(last, (i + 1) * a.block_size);
        if (begin >= end) return;
        Piece piece{a.blocks[i], begin - i * a.block_size, begin - a.start, end - begin};
        const bool as_it_is = a.by_blocks != 0 && by_parts && piece.num_tokens == a.block_size;
        uint64_t sum = 0;
        int64_t offset = 0, num_tokens = a.num_tokens;
        if (a.by_blocks != 0) {
            offset = piece.token * token_bytes;
            num_tokens = piece.num_tokens;
            piece.token = 0;
        }
        for (Plane plane : planes) {
            if (plane.cache == nullptr) continue;
            plane.offset = offset;
            offset += num_tokens * plane.row_bytes;
            char* const cache = plane.cache + place(a, piece, 0) * a.block_size * (plane.row_bytes / a.num_heads);
            if (as_it_is) sum += copy_bytes<GATHER>(a, cache, plane.offset, num_tokens * plane.row_bytes);
            else sum += copy_piece<GATHER>(a, plane, piece, by_parts);
        }
        total += sum;
    };
    if (a.parallel != 0) pool::parallel_for(num_blocks, copy_block);
    else
        for (int64_t i = 0; i < num_blocks; ++i) copy_block(i);
    if (GATHER && !by_parts) total += checksum::of_part(a.payload, 0, a.num_tokens * token_bytes);
    if (!GATHER) _mm_sfence();  // what went past the caches is seen by whoever is told
    return total;
}

}  // namespace

// Both return the checksum of the payload.
extern "C" EXPORT uint64_t penstock_kv_gather(const KVCopyArguments* arguments) { return copy<true>(*arguments); }

extern "C" EXPORT uint64_t penstock_kv_scatter(const KVCopyArguments* arguments) { return copy<false>(*arguments); }
