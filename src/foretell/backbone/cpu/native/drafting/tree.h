// A token tree while it is drafted: what trees/growing.py does, step by step.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace foretell {

struct Node {
    int32_t parent;
    int64_t token;
    float said;     // log-probability given its parent
    double value;   // of its path
    const float* embedded;
    const float* ended;  // the state that its head ended in
};

// Log-probabilities as they should have been said (trees/calibration.py).
inline float believed(float said, const float* scale) {
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

// The root and these nodes, parents first, where the caller wants them.
inline void put_tree(const Tree& tree, const std::vector<int32_t>& nodes, int64_t* parents, int64_t* tokens,
                     double* given) {
    std::vector<int32_t> place(tree.nodes.size());
    for (int64_t i = 0; i < (int64_t)nodes.size(); i++) {
        const Node& node = tree.nodes[nodes[i]];
        place[nodes[i]] = (int32_t)i;
        parents[i] = i ? place[node.parent] : -1;
        tokens[i] = node.token;
        given[i] = std::exp((double)node.said);
    }
}

}  // namespace foretell
