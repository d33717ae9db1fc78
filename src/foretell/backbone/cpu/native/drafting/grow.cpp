// A token tree drafted level by level in one call: heads are evaluated at the nodes that may still be among the best, their
// guesses join the tree, and the most probable nodes are the draft (EAGLE-2's growth, arXiv 2406.16858, §4).
//
// The algorithm is written out in trees/growing.py and drafters/hydra/drafter.py; this follows them step by step, because
// after a pass of the backbone the interpreter's own data has left the caches and every operation in Python costs tenths
// of a millisecond.
#include <deque>

#include "drafting/growing_tree.h"

namespace foretell {

// What the head of a level reads at each node of the frontiers: the row's states, then the embeddings along the path.
static void collect_inputs(const LevelDrafting& d, const LevelRequest& r, std::vector<GrowingTree>& trees,
                           const float* embeddings, std::vector<const float*>& inputs) {
    inputs.clear();
    for (int64_t b = 0; b < r.rows; b++) {
        std::vector<TreeNode>& nodes = trees[b].nodes;
        for (int32_t node : trees[b].frontier) {
            nodes[node].embedding = embeddings;
            embeddings += d.hidden;
            for (int64_t s = 0; s < d.streams; s++) inputs.push_back(r.states[b] + s * d.hidden);
            int64_t path = inputs.size();
            for (int32_t up = node; up >= 0; up = nodes[up].parent) inputs.push_back(nodes[up].embedding);
            std::reverse(inputs.begin() + path, inputs.end());
        }
    }
}

void grow(const Kernels& build, const LevelDrafting& d, const LevelRequest& r, int bf16) {
    std::vector<GrowingTree> trees;
    for (int64_t b = 0; b < r.rows; b++) trees.emplace_back(r.roots[b], r.states[b] != nullptr);
    std::deque<std::vector<float>> embeddings;  // of each level
    std::vector<const float*> inputs;
    std::vector<float> log_probs;
    std::vector<int64_t> ids, tokens;
    for (int64_t k = 0; k < d.levels; k++) {
        ids.clear();
        for (GrowingTree& tree : trees)
            for (int32_t node : tree.frontier) ids.push_back(tree.nodes[node].token);
        int64_t rows = ids.size();
        if (!rows) break;
        float* embedded = embeddings.emplace_back(rows * d.hidden).data();
        build.rows(*d.embedding, ids.data(), rows, embedded);
        collect_inputs(d, r, trees, embedded, inputs);
        log_probs.resize(rows * d.width), tokens.resize(rows * d.width);
        build.heads(d.heads[k], inputs.data(), rows, d.width, log_probs.data(), tokens.data(), nullptr, bf16);
        if (d.scales)
            for (float& log_prob : log_probs) log_prob = calibrated(log_prob, d.scales + 2 * k);
        for (int64_t& token : tokens) token = d.vocabulary[token];
        int64_t first = 0;  // guess of this tree
        for (GrowingTree& tree : trees) {
            int64_t guesses = tree.frontier.size() * d.width;
            int32_t since = (int32_t)tree.nodes.size();
            tree.extend(log_probs.data() + first, tokens.data() + first, d.width, r.count);
            first += guesses;
            if (k + 1 < d.levels) tree.select_frontier(r.count, since, r.beam, r.min_gain);
        }
    }
    for (int64_t b = 0; b < r.rows; b++) {
        std::vector<int32_t> chosen = trees[b].best(r.count);
        chosen.push_back(0);
        std::sort(chosen.begin(), chosen.end());
        r.sizes[b] = chosen.size();
        int64_t to = b * (r.count + 1);
        trees[b].write(chosen, r.parents + to, r.tokens + to, r.cond_probs + to);
    }
}

}  // namespace foretell
