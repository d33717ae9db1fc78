// A token tree drafted level by level in one call: heads are asked at the nodes that may still be among the best, their
// guesses join the tree, and the most probable nodes are what is drafted (EAGLE-2's growth, arXiv 2406.16858, §4).
// What is grown, and why, is written out in trees/grow.py and drafters/hydra.py, which this follows step by step:
// after a pass of the backbone the interpreter's own data has left the caches, and every call of it costs tenths of
// a millisecond.
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "common.h"

namespace foretell {

namespace {

struct Node {
    int32_t parent;
    int64_t token;
    float said;     // log-probability given its parent
    double value;   // of its path
    const float* embedded;
    const float* ended;  // the state that its head ended in
};

// Log-probabilities as they should have been said (trees/calibration.py).
float believed(float said, const float* scale) {
    said = std::fmin(std::fmax(said, -50.0f), -1e-6f);
    float odds = said - std::log(-std::expm1(said)), z = -(scale[0] * odds + scale[1]);
    return -(std::fmax(z, 0.0f) + std::log1p(std::exp(-std::fabs(z))));
}

struct Tree {
    std::vector<Node> nodes;
    std::vector<int32_t> asked;
    double floor = -INFINITY;

    // Guesses behind `asked` that might be among the `count` best; of equals, the earlier.
    void extend(const float* said, const int64_t* tokens, int64_t width, int64_t count) {
        struct Guess { double value; int64_t at; };
        std::vector<Guess> guesses;
        for (int64_t i = 0; i < (int64_t)asked.size() * width; i++)
            if (!std::isnan(said[i])) guesses.push_back({nodes[asked[i / width]].value + said[i], i});
        std::stable_sort(guesses.begin(), guesses.end(), [](auto& a, auto& b) { return a.value > b.value; });
        if ((int64_t)guesses.size() > count) guesses.resize(count);
        std::sort(guesses.begin(), guesses.end(), [](auto& a, auto& b) { return a.at < b.at; });
        for (auto& each : guesses) {
            if (!(each.value > floor)) continue;
            int32_t parent = asked[each.at / width];
            float certain = std::min(0.0f, said[each.at]);
            nodes.push_back({parent, tokens[each.at], certain, nodes[parent].value + certain, nullptr, nullptr});
        }
    }

    // Without the root; none is less probable than its child, and of equals the older come first: they are a tree.
    std::vector<int32_t> best(int64_t count) const {
        std::vector<int32_t> order;
        for (int32_t i = 1; i < (int32_t)nodes.size(); i++) order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return nodes[a].value > nodes[b].value; });
        if ((int64_t)order.size() > count) order.resize(count);
        return order;
    }

    // Whom to ask next: nobody where that can hardly gain anything.
    void narrow(int64_t count, int32_t since, int64_t most, double least) {
        std::vector<int32_t> order = best(count);
        floor = !order.empty() && (int64_t)order.size() == count ? nodes[order.back()].value : -INFINITY;
        asked.clear();
        double gained = 0;
        for (int32_t node : order)
            if (node >= since && (int64_t)asked.size() < most) {
                asked.push_back(node);
                gained += std::exp(nodes[node].value);
            }
        if (gained - asked.size() * std::exp(floor) < least) asked.clear();
    }
};

}  // namespace

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
            embed(build, d.embedding, (int)d.packed, ids.data(), rows, d.hidden, embedded, bf16);
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
        std::vector<int32_t> chosen = trees[b].best(w.count), place(trees[b].nodes.size());
        chosen.push_back(0);
        std::sort(chosen.begin(), chosen.end());
        w.sizes[b] = chosen.size();
        for (int64_t i = 0; i < (int64_t)chosen.size(); i++) {
            const Node& node = trees[b].nodes[chosen[i]];
            place[chosen[i]] = (int32_t)i;
            int64_t to = b * (w.count + 1) + i;
            w.parents[to] = i ? place[node.parent] : -1;
            w.tokens[to] = node.token;
            w.given[to] = std::exp((double)node.said);
        }
    }
}

}  // namespace foretell
