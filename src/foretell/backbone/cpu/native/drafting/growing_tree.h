// A token tree while it is drafted: `GrowingTree` of trees/growing.py, step by step.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace foretell {

struct TreeNode {
    int32_t parent;
    int64_t token;
    float log_prob;        // given its parent
    double path_log_prob;  // of its path
    const float* embedding;
};

// `calibrated` of trees/calibration.py.
inline float calibrated(float log_prob, const float* scale) {
    log_prob = std::fmin(std::fmax(log_prob, -50.0f), -1e-6f);
    float odds = log_prob - std::log(-std::expm1(log_prob)), z = -(scale[0] * odds + scale[1]);
    return -(std::fmax(z, 0.0f) + std::log1p(std::exp(-std::fabs(z))));
}

struct GrowingTree {
    std::vector<TreeNode> nodes;
    std::vector<int32_t> frontier;  // nodes that the next level expands
    double min_log_prob = -INFINITY;

    GrowingTree(int64_t root, bool expanded) {
        nodes.push_back({-1, root, 0, 0, nullptr});
        if (expanded) frontier.push_back(0);
    }

    // Adds those guesses after the frontier that may be among the `count` best nodes; of equals, the earlier.
    void extend(const float* log_probs, const int64_t* tokens, int64_t width, int64_t count) {
        struct Guess { double path_log_prob; int64_t index; };
        std::vector<Guess> guesses;
        for (int64_t i = 0; i < (int64_t)frontier.size() * width; i++)
            if (!std::isnan(log_probs[i])) guesses.push_back({nodes[frontier[i / width]].path_log_prob + log_probs[i], i});
        std::stable_sort(guesses.begin(), guesses.end(), [](auto& a, auto& b) { return a.path_log_prob > b.path_log_prob; });
        if ((int64_t)guesses.size() > count) guesses.resize(count);
        std::sort(guesses.begin(), guesses.end(), [](auto& a, auto& b) { return a.index < b.index; });
        for (auto& guess : guesses) {
            if (!(guess.path_log_prob > min_log_prob)) continue;
            int32_t parent = frontier[guess.index / width];
            float log_prob = std::min(0.0f, log_probs[guess.index]);
            nodes.push_back({parent, tokens[guess.index], log_prob, nodes[parent].path_log_prob + log_prob, nullptr});
        }
    }

    // The most probable nodes without the root. None is less probable than its child, and of equals the older comes first:
    // together with the root they are a tree.
    std::vector<int32_t> best(int64_t count) const {
        std::vector<int32_t> order;
        for (int32_t i = 1; i < (int32_t)nodes.size(); i++) order.push_back(i);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return nodes[a].path_log_prob > nodes[b].path_log_prob; });
        if ((int64_t)order.size() > count) order.resize(count);
        return order;
    }

    // Of the `count` best nodes those from `since` on, at most `beam`; none if the expected gain is below `min_gain` tokens.
    void select_frontier(int64_t count, int32_t since, int64_t beam, double min_gain) {
        std::vector<int32_t> order = best(count);
        min_log_prob = !order.empty() && (int64_t)order.size() == count ? nodes[order.back()].path_log_prob : -INFINITY;
        frontier.clear();
        double expected = 0;
        for (int32_t node : order)
            if (node >= since && (int64_t)frontier.size() < beam) {
                frontier.push_back(node);
                expected += std::exp(nodes[node].path_log_prob);
            }
        if (expected - frontier.size() * std::exp(min_log_prob) < min_gain) frontier.clear();
    }

    // Writes the root and these nodes, parents first, to arrays of the caller's.
    void write(const std::vector<int32_t>& chosen, int64_t* parents, int64_t* tokens, double* cond_probs) const {
        std::vector<int32_t> index(nodes.size());
        for (int64_t i = 0; i < (int64_t)chosen.size(); i++) {
            const TreeNode& node = nodes[chosen[i]];
            index[chosen[i]] = (int32_t)i;
            parents[i] = i ? index[node.parent] : -1;
            tokens[i] = node.token;
            cond_probs[i] = std::exp((double)node.log_prob);
        }
    }
};

}  // namespace foretell
