// A mixture of experts: rows are grouped by expert, each expert runs over the rows that are its own, without padding,
// and a token's results are added up in the order of its choices.
//
// T tokens, C hidden size, I size of an expert, E experts, k chosen ones a token; R = T k rows.
#include <vector>

#include "ops.h"

namespace {

enum Slot { PACKED_X, PACKED_INNER, INNER, RESULTS };

// Rows of one expert: [start, start + num_rows) of all rows grouped by expert.
struct Group {
    int64_t expert, start, num_rows;
    PackedRows packed;
    RowSource source;
};

struct Grouped {
    std::vector<Group> groups;           // experts with at least one row
    std::vector<int32_t> token;          // [R], of each row
    std::vector<int64_t> row_of_choice;  // [T, k]: where a choice's row is

    Grouped(const int64_t* expert_ids, int64_t num_tokens, int64_t top_k, int64_t num_experts)
        : token(static_cast<size_t>(num_tokens * top_k)), row_of_choice(token.size()) {
        std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1);
        for (int64_t i = 0; i < num_tokens * top_k; ++i) ++next[static_cast<size_t>(expert_ids[i]) + 1];
        for (int64_t e = 0; e < num_experts; ++e) {
            const int64_t start = next[static_cast<size_t>(e)], num_rows = next[static_cast<size_t>(e) + 1];
            if (num_rows > 0) groups.push_back({e, start, num_rows, {}, {}});
            next[static_cast<size_t>(e) + 1] = start + num_rows;
        }
        for (int64_t i = 0; i < num_tokens * top_k; ++i) {
            const int64_t row = next[static_cast<size_t>(expert_ids[i])]++;
            token[static_cast<size_t>(row)] = static_cast<int32_t>(i / top_k);
            row_of_choice[static_cast<size_t>(i)] = row;
        }
    }
};

// Every group through its layer: out [R, N], grouped as the rows are.
void run_layer(Grouped& grouped, const Weights* const* layers, const float* x, bool by_token, Slot slot, float* out) {
    int64_t num_bytes = 0, num_tiles = 0;
    const auto room = [&](const Group& g) { return (packed_rows_bytes(*layers[g.expert], g.num_rows) + 63) / 64 * 64; };
    for (const Group& g : grouped.groups) num_bytes += room(g);
    char* memory = static_cast<char*>(scratch(slot, num_bytes));
    std::vector<std::pair<Group*, int64_t>> tiles, panels;
    for (Group& g : grouped.groups) {
        const Weights& w = *layers[g.expert];
        g.source = by_token ? RowSource{x, grouped.token.data() + g.start} : RowSource{x + g.start * w.k, nullptr};
        g.packed = lay_out_rows(w, g.source, g.num_rows, memory);
        memory += room(g);
        num_tiles += g.packed.num_tiles();
        for (int64_t tile = 0; tile < g.packed.num_tiles(); ++tile) tiles.emplace_back(&g, tile);
        for (int64_t panel = 0; panel < w.num_panels(); ++panel) panels.emplace_back(&g, panel);
    }
    pool::parallel_for(num_tiles, [&](int64_t item) {
        const auto& [g, tile] = tiles[static_cast<size_t>(item)];
        pack_tile(*layers[g->expert], g->source, g->packed, tile);
    });
    pool::parallel_for(static_cast<int64_t>(panels.size()), [&](int64_t item) {
        const auto& [g, panel] = panels[static_cast<size_t>(item)];
        const Weights& w = *layers[g->expert];
        multiply_panel(w, g->packed, panel, 0, g->packed.num_tiles(), out + g->start * w.n, w.n, nullptr);
    });
}

}  // namespace

extern "C" {

// gate_up, down: E layers each, gated [I, C] and plain [C, I]. x, residual (or null), out: [T, C]; weights: [T, k];
// expert_ids: [T, k], each in [0, E).
EXPORT void penstock_experts(const Weights* const* gate_up, const Weights* const* down, int64_t num_experts, const float* x,
                             const float* weights, const int64_t* expert_ids, int64_t num_tokens, int64_t top_k,
                             const float* residual, float* out) {
    Grouped grouped(expert_ids, num_tokens, top_k, num_experts);
    const int64_t hidden = down[0]->n, num_rows = num_tokens * top_k;
    float* inner = static_cast<float*>(scratch(INNER, num_rows * gate_up[0]->n * static_cast<int64_t>(sizeof(float))));
    float* results = static_cast<float*>(scratch(RESULTS, num_rows * hidden * static_cast<int64_t>(sizeof(float))));
    run_layer(grouped, gate_up, x, true, PACKED_X, inner);
    run_layer(grouped, down, inner, false, PACKED_INNER, results);
    pool::parallel_for(num_tokens, [&](int64_t token) {
        for (int64_t c = 0; c < hidden; c += LANES) {
            const int n = static_cast<int>(std::min<int64_t>(LANES, hidden - c));
            vf total = zero();
            for (int64_t choice = token * top_k; choice < (token + 1) * top_k; ++choice) {
                const float* row = results + grouped.row_of_choice[static_cast<size_t>(choice)] * hidden + c;
                total = fma(set1(weights[choice]), load_first(row, n), total);
            }
            if (residual) total = add(total, load_first(residual + token * hidden + c, n));
            store_first(out + token * hidden + c, total, n);
        }
    });
}

}
