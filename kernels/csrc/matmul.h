// y = x W^T over weights packed in panels of 32 columns, in whatever form they are stored.
//
// T rows of x, K input features, N output features, P panels. A panel holds, for each k in turn, 32 values: of 32 output
// features, or of 16 gates and the 16 ups that they belong to. Rows come in tiles of up to MAX_ROWS, transposed, so that
// the innermost loop reads both sides from front to back.
//
// Every element of y is summed over k in order, one fused multiply-add after the other (integers: exactly): its bits
// depend on its row of x and its row of W, and neither on T nor on which threads ran.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"
#include "simd.h"

enum class Kind : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, CODES4 = 4, CODES8 = 5 };
enum class Activation : int32_t { NONE = 0, SILU = 1, GELU_TANH = 2, SWIGLU_OAI = 3 };

constexpr int64_t PANEL = 2 * LANES;

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;  // 24 accumulators of 32 registers
#else
constexpr int MAX_ROWS = 5;  // one half of a panel at a time: 10 accumulators of 16 registers
#endif

// Activations of INT8 layers: how many k's one instruction takes, and in which type it wants them.
#if defined(__AVX512VNNI__)
constexpr int64_t INT8_STEP = 4;
using Int8Row = uint8_t;  // code + 128
#else
constexpr int64_t INT8_STEP = 2;
using Int8Row = int16_t;
#endif

// As Python fills it in; see kernels/native_linear.py.
struct Weights {
    Kind kind;
    Activation activation;  // NONE: 32 features a panel; else 16 gates and 16 ups
    int64_t n, k;
    int64_t group_size;     // CODES4, CODES8
    const void* data;       // [P, K, 32]; INT8: [P, K / step, 32, step]; CODES4: [P, K / 2, 32], the even k in the low half
    const float* scales;    // INT8: [P, 32]; CODES: [P, K / group_size, 32]
    const float* offsets;   // CODES: as scales, added to each product of code and scale
    const int32_t* sums;    // INT8: [P, 32], 128 times the sum of a column's codes
    const float* bias;      // [P, 32] or null

    bool gated() const { return activation != Activation::NONE; }
    int64_t features_per_panel() const { return gated() ? LANES : PANEL; }
    int64_t num_panels() const { return (n + features_per_panel() - 1) / features_per_panel(); }
};

// Rows of x as the kernels read them: tile t holds rows [t * MAX_ROWS, ...) as [K][rows].
struct PackedRows {
    int64_t num_rows;
    float* floats;          // all but INT8
    Int8Row* codes;         // INT8: [K / step][rows][step], zeros behind K
    float* scales;          // INT8: [T]

    int64_t num_tiles() const { return (num_rows + MAX_ROWS - 1) / MAX_ROWS; }
    int rows_in(int64_t tile) const { return static_cast<int>(std::min<int64_t>(MAX_ROWS, num_rows - tile * MAX_ROWS)); }
};

inline int64_t int8_row_len(int64_t k) { return (k + INT8_STEP - 1) / INT8_STEP * INT8_STEP; }

// Bytes of memory that `lay_out_rows` needs.
int64_t packed_rows_bytes(const Weights& w, int64_t num_rows);

// Rows of x [*, K] (row_ids[i], or i where it is null), to be packed into `memory` by `pack_tile`.
struct RowSource {
    const float* x;
    const int32_t* row_ids;
    const float* row(int64_t i, int64_t k) const { return x + (row_ids ? row_ids[i] : i) * k; }
};
PackedRows lay_out_rows(const Weights& w, const RowSource& source, int64_t num_rows, void* memory);
void pack_tile(const Weights& w, const RowSource& source, const PackedRows& rows, int64_t tile);

// One panel times all tiles in [first, last): y rows go to out[row_in_pack * out_stride + feature], plus residual where
// there is one (of the same shape as out).
void multiply_panel(const Weights& w, const PackedRows& rows, int64_t panel, int64_t first, int64_t last, float* out,
                    int64_t out_stride, const float* residual);

// Aligned memory of the calling thread, for as long as it does not ask for the same slot again.
void* scratch(int slot, int64_t num_bytes);
