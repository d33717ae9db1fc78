// A token tree while it is drafted: the twin of GrowingTree in trees/growing.py, step by step.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace foretell {

// A log-probability after Platt scaling: calibrated() of trees/calibration.py.
inline float calibrated(float log_prob, const float* scale) {
    log_prob = std::fmin(std::fmax(log_prob, -50.0f), -1e-6f);  // NaN counts as impossible
    float odds = log_prob - std::log(-std::expm1(log_prob)), z = -(scale[0] * odds + scale[1]);
    return -(std::fmax(z, 0.0f) + std::log1p(std::exp(-std::fabs(z))));
}

// Node 0 is the root. One entry per node: its token, its parent, its log-probability given the parent, and that of its
// path. The next level expands the frontier; guesses below `min_log_prob` need not be added.
struct GrowingTree {
    std::vector<int64_t> tokens;
    std::vector<int32_t> parents{-1}, frontier;
    std::vector<float> log_probs{0.0f};
    std::vector<double> path_log_probs{0.0};
    double min_log_prob = -INFINITY;

    explicit GrowingTree(int64_t root, bool expand) : tokens{root} {
        if (expand) frontier.push_back(0);
    }
    int32_t size() const { return (int32_t)tokens.size(); }
    double cond_prob(int32_t node) const { return std::exp((double)log_probs[node]); }

    void add(int32_t parent, int64_t token, float log_prob) {
        log_prob = std::min(0.0f, log_prob);
        tokens.push_back(token), parents.push_back(parent), log_probs.push_back(log_prob);
        path_log_probs.push_back(path_log_probs[parent] + log_prob);
    }

    // Adds those guesses after the frontier, [frontier][width], that may be among the `count` best nodes; of equals, the
    // earlier ones.
    void extend(const float* guess_log_probs, const int64_t* guess_tokens, int64_t width, int64_t count) {
        struct Guess { double path_log_prob; int64_t index; };
        std::vector<Guess> guesses;
        for (int64_t i = 0; i < (int64_t)frontier.size() * width; i++)
            if (!std::isnan(guess_log_probs[i]))
                guesses.push_back({path_log_probs[frontier[i / width]] + guess_log_probs[i], i});
        std::stable_sort(guesses.begin(), guesses.end(),
                         [](const Guess& a, const Guess& b) { return a.path_log_prob > b.path_log_prob; });
        if ((int64_t)guesses.size() > count) guesses.resize(count);
        std::sort(guesses.begin(), guesses.end(), [](const Guess& a, const Guess& b) { return a.index < b.index; });
        for (const Guess& guess : guesses)
            if (guess.path_log_prob > min_log_prob)
                add(frontier[guess.index / width], guess_tokens[guess.index], guess_log_probs[guess.index]);
    }

    // The most probable nodes without the root. No node is less probable than its child, and of equals the older comes
    // first: together with the root they are a tree.
    std::vector<int32_t> best(int64_t count) const {
        std::vector<int32_t> order;
        for (int32_t node = 1; node < size(); node++) order.push_back(node);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return path_log_probs[a] > path_log_probs[b]; });
        if ((int64_t)order.size() > count) order.resize(count);
        return order;
    }

    // Selects the next frontier: of the `count` best nodes those from `since` on, at most `beam` of them; none if the
    // expected gain is below `min_gain` tokens.
    void select_frontier(int64_t count, int32_t since, int64_t beam, double min_gain) {
        std::vector<int32_t> order = best(count);
        min_log_prob = !order.empty() && (int64_t)order.size() == count ? path_log_probs[order.back()] : -INFINITY;
        frontier.clear();
        double gain = 0;
        for (int32_t node : order)
            if (node >= since && (int64_t)frontier.size() < beam) {
                frontier.push_back(node);
                gain += std::exp(path_log_probs[node]);
            }
        if (gain - frontier.size() * std::exp(min_log_prob) < min_gain) frontier.clear();
    }

    // Writes the root and these nodes, parents first: parents as indices among them, tokens, and the probability of each
    // node given its parent.
    void write(const std::vector<int32_t>& nodes, int64_t* out_parents, int64_t* out_tokens, double* out_probs) const {
        std::vector<int32_t> index(tokens.size());
        for (int32_t i = 0; i < (int32_t)nodes.size(); i++) {
            int32_t node = nodes[i];
            index[node] = i;
            out_parents[i] = i ? index[parents[node]] : -1;
            out_tokens[i] = tokens[node];
            out_probs[i] = cond_prob(node);
        }
    }
};

}  // namespace foretell
