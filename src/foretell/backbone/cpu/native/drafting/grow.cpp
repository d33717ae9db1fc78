// A token tree drafted level by level in one call: the heads of a level read the frontier, their guesses join the tree, and
// the most probable nodes are drafted (EAGLE-2's growth, arXiv 2406.16858, §4).
// The twin of Hydra._by_level in drafters/hydra/drafter.py, which explains the steps: after a pass of the backbone the
// interpreter's own data has left the caches, and every call of it costs tenths of a millisecond.
#include <deque>

#include "drafting/growing_tree.h"

namespace foretell {

namespace {

struct Row {
    GrowingTree tree;
    std::vector<const float*> embedded;  // of each node that was expanded, its token's embedding

    Row(int64_t root, bool expand) : tree(root, expand) {}
};

// What the heads of a level read at the frontiers of all rows, in pointers: the row's states, then the embeddings of the
// path's tokens, root first.
void list_inputs(const LevelDrafting& drafting, const LevelRequest& request, const float* embedded, std::vector<Row>& rows,
                 std::vector<const float*>& inputs) {
    inputs.clear();
    for (int64_t b = 0; b < request.rows; b++) {
        Row& row = rows[b];
        row.embedded.resize(row.tree.size());
        for (int32_t node : row.tree.frontier) {
            row.embedded[node] = embedded;
            embedded += drafting.hidden;
            for (int64_t s = 0; s < drafting.streams; s++) inputs.push_back(request.states[b] + s * drafting.hidden);
            int64_t path = inputs.size();
            for (int32_t up = node; up >= 0; up = row.tree.parents[up]) inputs.push_back(row.embedded[up]);
            std::reverse(inputs.begin() + path, inputs.end());
        }
    }
}

}  // namespace

void grow(const Kernels& build, const LevelDrafting& drafting, const LevelRequest& request, int bf16) {
    std::vector<Row> rows;
    for (int64_t b = 0; b < request.rows; b++) rows.emplace_back(request.roots[b], request.states[b] != nullptr);
    std::deque<std::vector<float>> embeddings;  // level by level
    std::vector<const float*> inputs;
    std::vector<float> log_probs;
    std::vector<int64_t> ids, guesses;
    int64_t width = drafting.width;
    for (int64_t k = 0; k < drafting.levels; k++) {
        ids.clear();
        for (Row& row : rows)
            for (int32_t node : row.tree.frontier) ids.push_back(row.tree.tokens[node]);
        int64_t nodes = ids.size(), begin = 0;
        if (!nodes) break;
        float* embedded = embeddings.emplace_back(nodes * drafting.hidden).data();
        build.rows(*drafting.embedding, ids.data(), nodes, embedded);
        list_inputs(drafting, request, embedded, rows, inputs);
        log_probs.resize(nodes * width), guesses.resize(nodes * width);
        build.heads(drafting.heads[k], inputs.data(), nodes, width, log_probs.data(), guesses.data(), bf16);
        if (drafting.scales)
            for (float& log_prob : log_probs) log_prob = calibrated(log_prob, drafting.scales + 2 * k);
        for (int64_t& guess : guesses) guess = drafting.vocabulary[guess];
        for (Row& row : rows) {
            int64_t expanded = row.tree.frontier.size();
            int32_t since = row.tree.size();
            row.tree.extend(log_probs.data() + begin * width, guesses.data() + begin * width, width, request.count);
            begin += expanded;
            if (k + 1 < drafting.levels) row.tree.select_frontier(request.count, since, request.beam, request.min_gain);
        }
    }
    for (int64_t b = 0; b < request.rows; b++) {
        std::vector<int32_t> chosen = rows[b].tree.best(request.count);
        chosen.push_back(0);
        std::sort(chosen.begin(), chosen.end());
        request.sizes[b] = chosen.size();
        int64_t to = b * (request.count + 1);
        rows[b].tree.write(chosen, request.parents + to, request.tokens + to, request.cond_probs + to);
    }
}

}  // namespace foretell
