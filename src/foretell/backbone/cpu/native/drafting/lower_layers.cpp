// Token trees whose nodes pass the model's own lower layers while they grow, in one call: the twin of EarlyExitTrees in
// drafting/lower_layers.py, with Kangaroo's adapter or M2R2's fast stream. Between two levels the interpreter would cost as
// much as a layer.
#include <cstring>

#include "drafting/growing_tree.h"

namespace foretell {

namespace {

// The nodes of one pass over some rows, as the kernels read them; with `shadows`, each has one, behind those of its tree.
struct Pass {
    bool shadows = false;
    std::vector<int32_t> sequence, node, cache_row, length, offset{0}, parents, position, shadow;

    // Adds one row's tree, given by its parents and depths; the nodes from `first` on take part.
    void add(int64_t row, int64_t slots, const std::vector<int32_t>& tree, const std::vector<int32_t>& depth, int64_t first) {
        for (int32_t turn = 0; turn <= (int32_t)shadows; turn++)
            for (int64_t i = first; i < (int64_t)tree.size(); i++) {
                sequence.push_back((int32_t)cache_row.size()), node.push_back((int32_t)i);
                position.push_back((int32_t)slots + depth[i]), shadow.push_back(turn);
            }
        parents.insert(parents.end(), tree.begin(), tree.end());
        cache_row.push_back((int32_t)row), length.push_back((int32_t)slots);
        offset.push_back((int32_t)parents.size());
    }
    Rows rows(const float* cosine, const float* sine) const {
        return {(int64_t)node.size(), (int64_t)cache_row.size(), sequence.data(), node.data(), cache_row.data(),
                length.data(), offset.data(), parents.data(), position.data(), shadows ? shadow.data() : nullptr,
                cosine, sine};
    }
};

// A row's tree, and its nodes in the order in which they passed the layers.
struct Row {
    GrowingTree tree;
    std::vector<int32_t> ran;             // nodes of the tree
    std::vector<int32_t> order;           // of each node of the tree its index in `ran`, or -1
    std::vector<int32_t> parents, depth;  // of the nodes in `ran`, as a tree of their own
    std::vector<int64_t> streams;         // index of their streams among those of all rows
    int64_t ran_before = 0;               // nodes in `ran` before this level

    Row(int64_t root, bool expand) : tree(root, expand) {}

    // Appends the frontier to the nodes that ran; its streams begin at index `begin`.
    void run(int64_t begin) {
        ran_before = ran.size();
        order.resize(tree.size(), -1);
        for (int32_t node : tree.frontier) {
            int32_t parent = tree.parents[node], above = parent < 0 ? -1 : order[parent];
            order[node] = (int32_t)ran.size();
            streams.push_back(begin++);
            ran.push_back(node), parents.push_back(above), depth.push_back(above < 0 ? 0 : depth[above] + 1);
        }
    }
};

// Runs the layers over the streams [F, d] in `slow`, in place, and over a fast stream beside each, which begins as the same
// embedding and is left in `fast`: a shadow goes through the adapters.
void run_beside(const Kernels& build, const LowerLayers& lower, const DraftRequest& request, const Pass& pass, float* slow,
                std::vector<float>& fast, int bf16) {
    int64_t d = lower.model->hidden, all = pass.node.size(), nodes = all / 2;
    std::vector<int64_t> at[2];  // of each slow and each fast stream its place among both
    for (int64_t r = 0; r < all; r++) at[pass.shadow[r]].push_back(r);
    std::vector<float> both(all * d);
    for (auto& places : at)
        for (int64_t i = 0; i < nodes; i++) memcpy(both.data() + places[i] * d, slow + i * d, d * 4);
    Beside beside{nodes, lower.rank, at[1].data(), lower.down, lower.up};
    Span layers{0, request.layers, nullptr, nullptr, &beside};
    build.layers(*lower.model, *request.cache, pass.rows(request.cosine, request.sine), layers, both.data(), bf16);
    fast.resize(nodes * d);
    for (int64_t i = 0; i < nodes; i++) {
        memcpy(slow + i * d, both.data() + at[0][i] * d, d * 4);
        memcpy(fast.data() + i * d, both.data() + at[1][i] * d, d * 4);
    }
}

// Runs the adapter over the streams [F, d] of the frontiers, in place. Before the roots it reads the states that wait since
// the last commit; these stay in its cache, while the slots of the tree are written over by later passes.
void adapt(const Kernels& build, const LowerLayers& lower, const DraftRequest& request, std::vector<Row>& rows,
           std::vector<float>& stream, std::vector<int64_t>& own_length, int bf16) {
    int64_t d = lower.model->hidden, begin = 0;
    bool roots = own_length.empty();
    if (roots) own_length.assign(request.own_length, request.own_length + request.rows);
    std::vector<float> states;
    std::vector<int64_t> index;  // of each frontier node's state among `states`
    Pass pass;
    for (int64_t b = 0; b < request.rows; b++) {
        Row& row = rows[b];
        if (row.tree.frontier.empty()) continue;
        int64_t count = row.tree.frontier.size(), waiting = roots ? request.waiting[b] : 0;
        if (waiting) {
            std::vector<int32_t> chain(waiting + 1), depth(waiting + 1);
            for (int32_t i = 0; i <= waiting; i++) chain[i] = i - 1, depth[i] = i;
            pass.add(request.cache_row[b], own_length[b], chain, depth, 0);
            states.insert(states.end(), request.states[b], request.states[b] + waiting * d);
            own_length[b] += waiting;
        } else {
            pass.add(request.cache_row[b], own_length[b], row.parents, row.depth, row.ran_before);
        }
        states.insert(states.end(), stream.begin() + begin * d, stream.begin() + (begin + count) * d);
        for (int64_t i = count; i > 0; i--) index.push_back((int64_t)states.size() / d - i);
        begin += count;
    }
    float* taps[2] = {};
    Span layer{0, 1, lower.skip, taps, nullptr};
    build.layers(*lower.adapter, *request.own, pass.rows(request.cosine, request.sine), layer, states.data(), bf16);
    for (int64_t i = 0; i < begin; i++) memcpy(stream.data() + i * d, states.data() + index[i] * d, d * 4);
}

// Selects the next frontier of a row, whose guesses from node `since` on are new, as EarlyExitTrees.follow and
// select_frontier do.
void select_frontier(const DraftRequest& request, Row& row, int64_t b, int64_t level, int32_t since) {
    GrowingTree& tree = row.tree;
    if (request.thresholds) {
        bool sure = tree.size() > since && tree.cond_prob(since) >= request.thresholds[b];
        tree.frontier.clear();
        if (sure) tree.frontier.push_back(since);
    } else if (level < request.steps) {
        int64_t room = request.room - (int64_t)row.ran.size();
        tree.select_frontier(request.count, since, std::min(request.beam, room), request.min_gain);
    }
    if (level + 1 >= request.budget[b]) tree.frontier.clear();
}

// Moves a row's keys and values of the layers from one slot to another, both counted from its committed ones.
void move_slot(const DraftRequest& request, int64_t b, const Model& model, int64_t from, int64_t to, int64_t size) {
    const Cache& cache = *request.cache;
    int64_t bytes = model.head_dim * size, row = cache.starts[request.cache_row[b]] + request.length[b] * model.head_dim;
    for (int64_t l = 0; l < request.layers; l++)
        for (int64_t g = 0; g < model.kv_heads; g++)
            for (void* tensor : {cache.keys, cache.values}) {
                char* slots = (char*)tensor + (l * cache.layer_stride + g * cache.head_stride + row) * size;
                memcpy(slots + to * bytes, slots + from * bytes, bytes);
            }
}

// Writes what is drafted of a row: first those nodes that ran, their keys and values moved up to their slots, then the
// others. Chains keep all that ran.
void write_draft(const DraftRequest& request, Row& row, int64_t b, const Model& model, int64_t size) {
    row.order.resize(row.tree.size(), -1);
    std::vector<char> chosen(row.tree.size());
    chosen[0] = 1;
    if (request.thresholds)
        for (int32_t node : row.ran) chosen[node] = 1;
    int64_t room = request.count - (request.thresholds ? std::max<int64_t>(0, (int64_t)row.ran.size() - 1) : 0);
    for (int32_t node : row.tree.best(row.tree.size()))
        if (!chosen[node] && room-- > 0) chosen[node] = 1;
    std::vector<int32_t> nodes;
    int64_t out = b * (request.count + 1);
    for (int64_t i = 0; i < (int64_t)row.ran.size(); i++) {
        if (!chosen[row.ran[i]]) continue;
        int64_t slot = nodes.size();
        request.positions[out + slot] = row.streams[i];
        nodes.push_back(row.ran[i]);
        if (slot != i) move_slot(request, b, model, i, slot, size);
    }
    request.ran[b] = nodes.size();
    if (nodes.empty()) nodes.push_back(0);
    for (int32_t node = 1; node < row.tree.size(); node++)
        if (chosen[node] && row.order[node] < 0) nodes.push_back(node);
    request.sizes[b] = nodes.size();
    row.tree.write(nodes, request.parents + out, request.tokens + out, request.cond_probs + out);
}

}  // namespace

void grow_through_layers(const Kernels& build, const LowerLayers& lower, const DraftRequest& request, int bf16) {
    int64_t d = lower.model->hidden, width = lower.width, total = 0;
    std::vector<Row> rows;
    for (int64_t b = 0; b < request.rows; b++) rows.emplace_back(request.roots[b], request.budget[b] > 1);
    std::vector<float> stream, log_probs;
    std::vector<int64_t> ids, guesses, own_length;
    std::vector<const float*> inputs;
    std::vector<float*> taps(request.layers + 1);
    for (int64_t level = 1; level <= request.steps; level++) {
        Pass pass;
        pass.shadows = lower.down != nullptr;
        ids.clear();
        for (int64_t b = 0; b < request.rows; b++) {
            Row& row = rows[b];
            if (row.tree.frontier.empty()) continue;
            row.run(total + (int64_t)ids.size());
            for (int32_t node : row.tree.frontier) ids.push_back(row.tree.tokens[node]);
            pass.add(request.cache_row[b], request.length[b], row.parents, row.depth, row.ran_before);
        }
        int64_t nodes = ids.size();
        if (!nodes) break;
        float* hidden = request.hidden + total * d;
        build.rows(*lower.embedding, ids.data(), nodes, hidden);
        if (pass.shadows) {
            run_beside(build, lower, request, pass, hidden, stream, bf16);
        } else {
            for (int64_t l = 0; l <= request.layers; l++)
                taps[l] = request.tapped && request.tapped[l] ? request.tapped[l] + total * d : nullptr;
            Span layers{0, request.layers, nullptr, taps.data(), nullptr};
            build.layers(*lower.model, *request.cache, pass.rows(request.cosine, request.sine), layers, hidden, bf16);
            stream.assign(hidden, hidden + nodes * d);
        }
        total += nodes;
        if (lower.adapter) adapt(build, lower, request, rows, stream, own_length, bf16);
        build.norm(stream.data(), lower.norm, lower.eps, nodes, d, stream.data());
        inputs.clear();
        for (int64_t i = 0; i < nodes; i++) inputs.push_back(stream.data() + i * d);
        log_probs.resize(nodes * width), guesses.resize(nodes * width);
        build.heads(*lower.head, inputs.data(), nodes, width, log_probs.data(), guesses.data(), bf16);
        if (lower.scale)
            for (float& log_prob : log_probs) log_prob = calibrated(log_prob, lower.scale);
        for (int64_t& guess : guesses) guess = lower.vocabulary[guess];
        int64_t begin = 0;
        for (int64_t b = 0; b < request.rows; b++) {
            GrowingTree& tree = rows[b].tree;
            int64_t expanded = tree.frontier.size();
            if (!expanded) continue;
            int32_t since = tree.size();
            tree.extend(log_probs.data() + begin * width, guesses.data() + begin * width, width, request.count);
            begin += expanded;
            select_frontier(request, rows[b], b, level, since);
        }
    }
    for (int64_t b = 0; b < request.rows; b++) write_draft(request, rows[b], b, *lower.model, bf16 ? 2 : 4);
}

}  // namespace foretell
