// A token tree whose nodes pass the model's own lower layers while it grows, in one call: drafting/lower_layers.py step by
// step, and Kangaroo's adapter. Between two levels the interpreter would cost as much as a layer.
#include <cstring>

#include "drafting/growing_tree.h"
#include "drafting/pass.h"

namespace foretell {

namespace {

// One row's tree, and its nodes in the order in which they ran through the layers.
struct RowTree {
    GrowingTree tree;
    std::vector<int32_t> ran;             // nodes of the tree
    std::vector<int32_t> parents, depth;  // of those that ran, counted among them
    std::vector<int32_t> ran_index;       // of each node of the tree among those that ran, or -1
    std::vector<int64_t> stream_index;    // of those that ran, among the streams of all rows
    int64_t ran_before = 0;               // how many ran before this level

    // Appends the frontier, whose first stream gets this index.
    void run_frontier(int64_t first_stream) {
        ran_before = ran.size();
        ran_index.resize(tree.nodes.size(), -1);
        for (int32_t node : tree.frontier) {
            int32_t parent = tree.nodes[node].parent, above = parent < 0 ? -1 : ran_index[parent];
            ran_index[node] = (int32_t)ran.size();
            stream_index.push_back(first_stream++);
            ran.push_back(node), parents.push_back(above), depth.push_back(above < 0 ? 0 : depth[above] + 1);
        }
    }
};

}  // namespace

// Runs the adapter, in place, over the streams [F, d] of the frontiers. Before the roots it reads the committed states that
// are waiting: their keys stay in its cache, and those of the roots are not counted until somebody commits them.
static void adapt(const Kernels& build, const LowerLayerDrafting& l, const LowerLayerRequest& r, std::vector<RowTree>& trees,
                  std::vector<float>& streams, std::vector<int64_t>& own_length, int bf16) {
    int64_t d = l.model->hidden, first = 0;
    bool roots = own_length.empty();
    if (roots) own_length.assign(r.own_length, r.own_length + r.rows);
    std::vector<float> states;
    std::vector<int64_t> state_index;  // of each frontier node, among the states
    Pass pass;
    for (int64_t b = 0; b < r.rows; b++) {
        RowTree& row = trees[b];
        int64_t expanded = row.tree.frontier.size(), waiting = roots ? r.waiting[b] : 0;
        if (!expanded) continue;
        if (waiting) {
            pass.add_chain(r.cache_row[b], own_length[b], waiting + 1);
            states.insert(states.end(), r.states[b], r.states[b] + waiting * d);
            own_length[b] += waiting;
        } else {
            pass.add(r.cache_row[b], own_length[b], row.parents, row.depth, row.ran_before);
        }
        states.insert(states.end(), streams.begin() + first * d, streams.begin() + (first + expanded) * d);
        for (int64_t i = expanded; i > 0; i--) state_index.push_back((int64_t)states.size() / d - i);
        first += expanded;
    }
    float* taps[2] = {};
    build.layers(*l.adapter, *r.own, pass.rows(r.cosine, r.sine), Span{0, 1, l.skip, taps}, states.data(), bf16);
    for (int64_t i = 0; i < first; i++) memcpy(streams.data() + i * d, states.data() + state_index[i] * d, d * 4);
}

// Moves keys and values of one row in the drafting layers from one slot after its committed ones to another.
static void move_slot(const LowerLayerRequest& r, const Model& model, int64_t b, int64_t from, int64_t to, int64_t itemsize) {
    int64_t bytes = model.head_dim * itemsize;
    for (int64_t l = 0; l < r.layers; l++)
        for (int64_t g = 0; g < model.kv_heads; g++)
            for (void* tensor : {r.cache->keys, r.cache->values}) {
                int64_t head = l * r.cache->layer_stride + r.cache->starts[r.cache_row[b]] + g * r.cache->head_stride;
                char* slots = (char*)tensor + (head + r.length[b] * model.head_dim) * itemsize;
                memcpy(slots + to * bytes, slots + from * bytes, bytes);
            }
}

// Writes the draft of a row: first the chosen nodes that ran, moved up to their slots, then the others.
static void write_draft(const LowerLayerRequest& r, RowTree& row, int64_t b, const Model& model, int64_t itemsize) {
    row.ran_index.resize(row.tree.nodes.size(), -1);
    std::vector<char> chosen(row.tree.nodes.size());
    chosen[0] = 1;
    if (r.thresholds)
        for (int32_t node : row.ran) chosen[node] = 1;
    int64_t room = r.count - (r.thresholds ? std::max<int64_t>(0, (int64_t)row.ran.size() - 1) : 0);
    for (int32_t node : row.tree.best(row.tree.nodes.size()))
        if (!chosen[node] && room-- > 0) chosen[node] = 1;
    std::vector<int32_t> nodes;
    int64_t to = b * (r.count + 1);
    for (int64_t i = 0; i < (int64_t)row.ran.size(); i++) {
        if (!chosen[row.ran[i]]) continue;
        int64_t slot = nodes.size();
        r.stream_index[to + slot] = row.stream_index[i];
        nodes.push_back(row.ran[i]);
        if (slot != i) move_slot(r, model, b, i, slot, itemsize);
    }
    r.ran[b] = nodes.size();
    if (nodes.empty()) nodes.push_back(0);
    for (int32_t node = 1; node < (int32_t)row.tree.nodes.size(); node++)
        if (chosen[node] && row.ran_index[node] < 0) nodes.push_back(node);
    r.sizes[b] = nodes.size();
    row.tree.write(nodes, r.parents + to, r.tokens + to, r.cond_probs + to);
}

// Adds a level's guesses to a row's tree and selects what the next level expands.
static void extend(const LowerLayerRequest& r, int64_t b, int64_t level, int64_t width, const float* log_probs,
                   const int64_t* tokens, RowTree& row) {
    GrowingTree& tree = row.tree;
    int32_t since = (int32_t)tree.nodes.size();
    tree.extend(log_probs, tokens, width, r.count);
    if (r.thresholds) {  // a chain goes on behind its best guess while that is probable enough
        tree.frontier.clear();
        bool probable = (int32_t)tree.nodes.size() > since &&
                        std::exp((double)tree.nodes[since].log_prob) >= r.thresholds[b];
        if (probable) tree.frontier.push_back(since);
    } else if (level < r.steps) {
        tree.select_frontier(r.count, since, std::min(r.beam, r.room - (int64_t)row.ran.size()), r.min_gain);
    }
    if (level + 1 >= r.budget[b]) tree.frontier.clear();
}

void grow_through_layers(const Kernels& build, const LowerLayerDrafting& l, const LowerLayerRequest& r, int bf16) {
    int64_t d = l.model->hidden, total = 0;  // streams so far
    std::vector<RowTree> trees;
    for (int64_t b = 0; b < r.rows; b++) trees.push_back({GrowingTree(r.roots[b], r.budget[b] > 1), {}, {}, {}, {}, {}});
    std::vector<float> streams, log_probs;
    std::vector<int64_t> ids, tokens, own_length;
    std::vector<const float*> inputs;
    std::vector<float*> taps(r.layers + 1);
    for (int64_t level = 1; level <= r.steps; level++) {
        Pass pass;
        ids.clear();
        for (int64_t b = 0; b < r.rows; b++) {
            RowTree& row = trees[b];
            if (row.tree.frontier.empty()) continue;
            row.run_frontier(total + (int64_t)ids.size());
            for (int32_t node : row.tree.frontier) ids.push_back(row.tree.nodes[node].token);
            pass.add(r.cache_row[b], r.length[b], row.parents, row.depth, row.ran_before);
        }
        int64_t rows = ids.size();
        if (!rows) break;
        float* hidden = r.hidden + total * d;
        build.rows(*l.embedding, ids.data(), rows, hidden);
        for (int64_t t = 0; t <= r.layers; t++) taps[t] = r.tapped && r.tapped[t] ? r.tapped[t] + total * d : nullptr;
        build.layers(*l.model, *r.cache, pass.rows(r.cosine, r.sine), Span{0, r.layers, nullptr, taps.data()}, hidden, bf16);
        total += rows;
        streams.assign(hidden, hidden + rows * d);
        if (l.adapter) adapt(build, l, r, trees, streams, own_length, bf16);
        build.norm(streams.data(), l.norm, l.eps, rows, d, streams.data());
        inputs.clear();
        for (int64_t i = 0; i < rows; i++) inputs.push_back(streams.data() + i * d);
        log_probs.resize(rows * l.width), tokens.resize(rows * l.width);
        build.heads(*l.head, inputs.data(), rows, l.width, log_probs.data(), tokens.data(), nullptr, bf16);
        if (l.scale)
            for (float& log_prob : log_probs) log_prob = calibrated(log_prob, l.scale);
        for (int64_t& token : tokens) token = l.vocabulary[token];
        int64_t first = 0;  // guess of this row
        for (int64_t b = 0; b < r.rows; b++) {
            int64_t guesses = trees[b].tree.frontier.size() * l.width;
            if (guesses) extend(r, b, level, l.width, log_probs.data() + first, tokens.data() + first, trees[b]);
            first += guesses;
        }
    }
    for (int64_t b = 0; b < r.rows; b++) write_draft(r, trees[b], b, *l.model, bf16 ? 2 : 4);
}

}  // namespace foretell
