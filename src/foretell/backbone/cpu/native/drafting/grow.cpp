// A token tree drafted level by level in one call: heads are asked at the nodes that may still be among the best, their
// guesses join the tree, and the most probable nodes are what is drafted (EAGLE-2's growth, arXiv 2406.16858, §4).
// What is grown, and why, is written out in trees/growing.py and drafters/hydra/drafter.py, which this follows step by step:
// after a pass of the backbone the interpreter's own data has left the caches, and every call of it costs tenths of
// a millisecond.
#include <deque>

#include "drafting/tree.h"

namespace foretell {

void grow(const Kernels& build, const Drafting& d, const Wanted& w, int bf16) {
    std::vector<Tree> trees(w.rows);
    std::deque<std::vector<float>> kept;  // embeddings and states, level by level
    for (int64_t b = 0; b < w.rows; b++) {
        trees[b].nodes.push_back({-1, w.roots[b], 0, 0, nullptr, nullptr});
        if (w.states[b]) trees[b].asked.push_back(0);
    }
    std::vector<const float*> parts;
    std::vector<float> values;
    std::vector<int64_t> ids, best;
    for (int64_t k = 0; k < d.levels; k++) {
        ids.clear();
        for (Tree& tree : trees)
            for (int32_t node : tree.asked) ids.push_back(tree.nodes[node].token);
        int64_t rows = ids.size(), at = 0;
        if (!rows) break;
        float* embedded = nullptr;
        if (d.grounded) {
            embedded = kept.emplace_back(rows * d.hidden).data();
            build.rows(*d.embedding, ids.data(), rows, embedded);
        }
        float* ended = d.chained ? kept.emplace_back(rows * d.hidden).data() : nullptr;
        parts.clear();
        for (int64_t b = 0; b < w.rows; b++)
            for (int32_t node : trees[b].asked) {
                Node& mine = trees[b].nodes[node];
                if (embedded) mine.embedded = embedded + at * d.hidden;
                if (ended) mine.ended = ended + at * d.hidden;
                at++;
                for (int64_t s = 0; s < d.streams; s++) parts.push_back(w.states[b] + s * d.hidden);
                int64_t path = parts.size();
                for (int32_t up = node; d.grounded && up >= 0; up = trees[b].nodes[up].parent)
                    parts.push_back(trees[b].nodes[up].embedded);
                std::reverse(parts.begin() + path, parts.end());
                if (d.chained && k) parts.push_back(trees[b].nodes[mine.parent].ended);
            }
        values.resize(rows * d.width), best.resize(rows * d.width);
        build.heads(d.heads[k], parts.data(), rows, d.width, values.data(), best.data(), ended, bf16);
        if (d.scales)
            for (float& said : values) said = believed(said, d.scales + 2 * k);
        for (int64_t& token : best) token = d.vocabulary[token];
        at = 0;
        for (Tree& tree : trees) {
            int64_t asked = tree.asked.size();
            int32_t since = (int32_t)tree.nodes.size();
            tree.extend(values.data() + at * d.width, best.data() + at * d.width, d.width, w.count);
            at += asked;
            if (k + 1 < d.levels) tree.narrow(w.count, since, w.beam, w.least);
        }
    }
    for (int64_t b = 0; b < w.rows; b++) {
        std::vector<int32_t> chosen = trees[b].best(w.count);
        chosen.push_back(0);
        std::sort(chosen.begin(), chosen.end());
        w.sizes[b] = chosen.size();
        int64_t to = b * (w.count + 1);
        put_tree(trees[b], chosen, w.parents + to, w.tokens + to, w.given + to);
    }
}

}  // namespace foretell
