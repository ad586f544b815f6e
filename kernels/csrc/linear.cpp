// Linear layers for Python: packing of their weights, and products.
#include "ops.h"

namespace {

// Where output feature `n` lies: of plain layers, or as the gate or up of a gated one.
enum class Place : int32_t { PLAIN = 0, GATE = 1, UP = 2 };

struct Column {
    int64_t panel, lane;
    Column(Place place, int64_t n)
        : panel(place == Place::PLAIN ? n / PANEL : n / LANES),
          lane(place == Place::PLAIN ? n % PANEL : n % LANES + (place == Place::UP ? LANES : 0)) {}
};

// Rows [num_rows, K] of items, into features [first_feature, ...) of panels in which column k of a lane is at
// (k / step * PANEL + lane) * step + k % step. Blocks of a few k's keep what is written in the cache.
template <class T>
void pack_items(const T* rows, int64_t num_rows, int64_t k, int64_t step, Place place, int64_t first_feature, T* panels) {
    constexpr int64_t ROWS_AT_ONCE = 16, COLUMNS_AT_ONCE = 64;
    const int64_t panel_len = (k + step - 1) / step * step * PANEL;
    pool::parallel_for((num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t block) {
        const int64_t first = block * ROWS_AT_ONCE, last = std::min(num_rows, first + ROWS_AT_ONCE);
        for (int64_t start = 0; start < k; start += COLUMNS_AT_ONCE)
            for (int64_t n = first; n < last; ++n) {
                const Column column(place, first_feature + n);
                T* out = panels + column.panel * panel_len + column.lane * step;
                for (int64_t i = start; i < std::min(k, start + COLUMNS_AT_ONCE); ++i)
                    out[i / step * PANEL * step + i % step] = rows[n * k + i];
            }
    });
}

}  // namespace

extern "C" {

// Bytes of `Weights::data`; they must start as zeros.
EXPORT void penstock_packed_bytes(const Weights* w, int64_t* num_bytes) {
    const int64_t columns = w->num_panels() * PANEL;
    switch (w->kind) {
        case Kind::F32: *num_bytes = columns * w->k * 4; break;
        case Kind::BF16:
        case Kind::F16: *num_bytes = columns * w->k * 2; break;
        case Kind::INT8: *num_bytes = columns * int8_row_len(w->k); break;
        case Kind::CODES8: *num_bytes = columns * w->k; break;
        case Kind::CODES4: *num_bytes = columns * w->k / 2; break;
    }
}

// rows: [num_rows, K], contiguous: floats or halves as they are stored, or codes [-128, 127]. CODES4 takes [num_rows, K / 2]
// bytes: two codes each, the even column in the low half.
EXPORT void penstock_pack(const Weights* w, const void* rows, int64_t num_rows, int32_t place, int64_t first_feature) {
    const Place at = static_cast<Place>(place);
    void* out = const_cast<void*>(w->data);
    switch (w->kind) {
        case Kind::F32:
            return pack_items(static_cast<const float*>(rows), num_rows, w->k, 1, at, first_feature, static_cast<float*>(out));
        case Kind::BF16:
        case Kind::F16:
            return pack_items(static_cast<const uint16_t*>(rows), num_rows, w->k, 1, at, first_feature, static_cast<uint16_t*>(out));
        case Kind::INT8:
            return pack_items(static_cast<const int8_t*>(rows), num_rows, w->k, INT8_STEP, at, first_feature, static_cast<int8_t*>(out));
        case Kind::CODES8:
            return pack_items(static_cast<const int8_t*>(rows), num_rows, w->k, 1, at, first_feature, static_cast<int8_t*>(out));
        case Kind::CODES4:
            return pack_items(static_cast<const int8_t*>(rows), num_rows, w->k / 2, 1, at, first_feature, static_cast<int8_t*>(out));
    }
}

// x: [T, K]; residual: [T, N] or null; out: [T, N]; all contiguous.
EXPORT void penstock_linear(const Weights* w, const float* x, int64_t num_rows, const float* residual, float* out) {
    const RowSource source{x, nullptr};
    const PackedRows rows = lay_out_rows(*w, source, num_rows, scratch(0, packed_rows_bytes(*w, num_rows)));
    const int64_t num_panels = w->num_panels(), num_tiles = rows.num_tiles();
    pool::parallel_for(num_tiles, [&](int64_t tile) { pack_tile(*w, source, rows, tile); });
    // Few panels and many rows: the rows are shared as well, or some threads would have nothing to do.
    const int64_t num_parts = std::min<int64_t>(num_tiles, num_panels < 4 * pool::num_threads() ? 4 : 1);
    pool::parallel_for(num_panels * num_parts, [&](int64_t item) {
        const int64_t panel = item / num_parts, part = item % num_parts;
        multiply_panel(*w, rows, panel, num_tiles * part / num_parts, num_tiles * (part + 1) / num_parts, out, w->n, residual);
    });
}

}
