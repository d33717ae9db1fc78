// A token tree whose nodes pass the model's own lower layers while it grows, in one call: what drafting/lower_layers.py does, and
// Kangaroo's adapter. Between two levels the interpreter would cost as much as a layer.
#include <cstring>

#include "drafting/tree.h"

namespace foretell {

namespace {

// The nodes of one pass over some rows, as the kernels read them.
struct Pass {
    std::vector<int32_t> sequence, node, cache_row, length, offset{0}, parents, position;

    // One row's tree, given by its parents and depths; the nodes from `first` on take part.
    void add(int64_t row, int64_t slots, const std::vector<int32_t>& tree, const std::vector<int32_t>& depth, int64_t first) {
        for (int64_t i = 0; i < (int64_t)tree.size(); i++) {
            parents.push_back(tree[i]);
            if (i < first) continue;
            sequence.push_back((int32_t)cache_row.size()), node.push_back((int32_t)i);
            position.push_back((int32_t)slots + depth[i]);
        }
        cache_row.push_back((int32_t)row), length.push_back((int32_t)slots);
        offset.push_back((int32_t)parents.size());
    }
    Rows rows(const float* cosine, const float* sine) const {
        return {(int64_t)node.size(), (int64_t)cache_row.size(), sequence.data(), node.data(), cache_row.data(),
                length.data(), offset.data(), parents.data(), position.data(), cosine, sine};
    }
};

// A row's tree, and its nodes in the order in which they pass the layers.
struct Row {
    Tree tree;
    std::vector<int32_t> ran, place, parents, depth;  // place: of the tree's nodes among those that ran; depth of these
    std::vector<int64_t> at;                          // where the streams of those that ran stand
    int64_t known = 0;                                // of them, before this level

    void run(int64_t begin) {
        known = ran.size();
        place.resize(tree.nodes.size(), -1);
        for (int32_t node : tree.asked) {
            int32_t parent = tree.nodes[node].parent, above = parent < 0 ? -1 : place[parent];
            place[node] = (int32_t)ran.size();
            at.push_back(begin++);
            ran.push_back(node), parents.push_back(above), depth.push_back(above < 0 ? 0 : depth[above] + 1);
        }
    }
};

}  // namespace

// Streams [F, d] of the nodes that have just run pass the adapter, in place. Before the roots it reads what was committed
// since: that stays in its cache, and the roots' keys do not count as long as nobody counts them.
static void adapt(const Kernels& build, const Lower& l, const Climb& c, std::vector<Row>& trees, std::vector<float>& stream,
                  std::vector<int64_t>& read, int bf16) {
    int64_t d = l.model->hidden, at = 0;
    bool roots = read.empty();
    if (roots) read.assign(c.own_length, c.own_length + c.rows);
    std::vector<float> states;
    std::vector<int64_t> last;  // of each node that is asked: where its stream stands among the states
    Pass pass;
    for (int64_t b = 0; b < c.rows; b++) {
        Row& row = trees[b];
        if (row.tree.asked.empty()) continue;
        int64_t asked = row.tree.asked.size(), waiting = roots ? c.waiting[b] : 0;
        if (waiting) {
            std::vector<int32_t> chain(waiting + 1), depth(waiting + 1);
            for (int32_t i = 0; i <= waiting; i++) chain[i] = i - 1, depth[i] = i;
            pass.add(c.cache_row[b], read[b], chain, depth, 0);
            states.insert(states.end(), c.states[b], c.states[b] + waiting * d);
            read[b] += waiting;
        } else {
            pass.add(c.cache_row[b], read[b], row.parents, row.depth, row.known);
        }
        states.insert(states.end(), stream.begin() + at * d, stream.begin() + (at + asked) * d);
        for (int64_t i = asked; i > 0; i--) last.push_back((int64_t)states.size() / d - i);
        at += asked;
    }
    float* taps[2] = {};
    build.layers(*l.adapter, *c.own, pass.rows(c.cosine, c.sine), Span{0, 1, l.skip, taps}, states.data(), bf16);
    for (int64_t i = 0; i < at; i++) memcpy(stream.data() + i * d, states.data() + last[i] * d, d * 4);
}

// What is drafted of a row: first those nodes that ran, their keys and values moved up to their slots, then the others.
static void choose(const Climb& c, Row& row, int64_t b, const Model& model, int64_t size) {
    row.place.resize(row.tree.nodes.size(), -1);
    std::vector<char> chosen(row.tree.nodes.size());
    chosen[0] = 1;
    if (c.thresholds)
        for (int32_t node : row.ran) chosen[node] = 1;
    int64_t room = c.count - (c.thresholds ? std::max<int64_t>(0, (int64_t)row.ran.size() - 1) : 0);
    for (int32_t node : row.tree.best(row.tree.nodes.size()))
        if (!chosen[node] && room-- > 0) chosen[node] = 1;
    std::vector<int32_t> nodes;
    int64_t to = b * (c.count + 1);
    for (int64_t i = 0; i < (int64_t)row.ran.size(); i++) {
        if (!chosen[row.ran[i]]) continue;
        int64_t place = nodes.size();
        c.at[to + place] = row.at[i];
        nodes.push_back(row.ran[i]);
        for (int64_t l = 0; place != i && l < c.layers; l++)
            for (int64_t g = 0; g < model.kv_heads; g++)
                for (void* tensor : {c.cache->keys, c.cache->values}) {
                    int64_t head = l * c.cache->layer_stride + c.cache->starts[c.cache_row[b]] + g * c.cache->head_stride;
                    char* slots = (char*)tensor + (head + c.length[b] * model.head_dim) * size;
                    memcpy(slots + place * model.head_dim * size, slots + i * model.head_dim * size, model.head_dim * size);
                }
    }
    c.ran[b] = nodes.size();
    if (nodes.empty()) nodes.push_back(0);
    for (int32_t node = 1; node < (int32_t)row.tree.nodes.size(); node++)
        if (chosen[node] && row.place[node] < 0) nodes.push_back(node);
    c.sizes[b] = nodes.size();
    put_tree(row.tree, nodes, c.parents + to, c.tokens + to, c.given + to);
}

void climb(const Kernels& build, const Lower& l, const Climb& c, int bf16) {
    int64_t d = l.model->hidden, total = 0;
    std::vector<Row> trees(c.rows);
    for (int64_t b = 0; b < c.rows; b++) {
        trees[b].tree.nodes.push_back({-1, c.roots[b], 0, 0, nullptr, nullptr});
        if (c.budget[b] > 1) trees[b].tree.asked.push_back(0);
    }
    std::vector<float> stream, values;
    std::vector<int64_t> ids, best, read;
    std::vector<const float*> parts;
    std::vector<float*> taps(c.layers + 1);
    for (int64_t level = 1; level <= c.steps; level++) {
        Pass pass;
        ids.clear();
        for (int64_t b = 0; b < c.rows; b++) {
            Row& row = trees[b];
            if (row.tree.asked.empty()) continue;
            row.run(total + (int64_t)ids.size());
            for (int32_t node : row.tree.asked) ids.push_back(row.tree.nodes[node].token);
            pass.add(c.cache_row[b], c.length[b], row.parents, row.depth, row.known);
        }
        int64_t rows = ids.size();
        if (!rows) break;
        float* hidden = c.hidden + total * d;
        build.rows(*l.embedding, ids.data(), rows, hidden);
        for (int64_t t = 0; t <= c.layers; t++) taps[t] = c.tapped && c.tapped[t] ? c.tapped[t] + total * d : nullptr;
        build.layers(*l.model, *c.cache, pass.rows(c.cosine, c.sine), Span{0, c.layers, nullptr, taps.data()}, hidden, bf16);
        total += rows;
        stream.assign(hidden, hidden + rows * d);
        if (l.adapter) adapt(build, l, c, trees, stream, read, bf16);
        build.norm(stream.data(), l.norm, l.eps, rows, d, stream.data());
        parts.clear();
        for (int64_t i = 0; i < rows; i++) parts.push_back(stream.data() + i * d);
        values.resize(rows * l.width), best.resize(rows * l.width);
        build.heads(*l.head, parts.data(), rows, l.width, values.data(), best.data(), nullptr, bf16);
        if (l.scale)
            for (float& said : values) said = believed(said, l.scale);
        for (int64_t& token : best) token = l.vocabulary[token];
        int64_t at = 0;
        for (int64_t b = 0; b < c.rows; b++) {
            Row& row = trees[b];
            int64_t asked = row.tree.asked.size();
            if (!asked) continue;
            int32_t since = (int32_t)row.tree.nodes.size();
            row.tree.extend(values.data() + at * l.width, best.data() + at * l.width, l.width, c.count);
            at += asked;
            if (c.thresholds) {
                row.tree.asked.clear();
                if ((int32_t)row.tree.nodes.size() > since && std::exp((double)row.tree.nodes[since].said) >= c.thresholds[b])
                    row.tree.asked.push_back(since);
            } else if (level < c.steps) {
                row.tree.narrow(c.count, since, std::min(c.beam, c.room - (int64_t)row.ran.size()), c.least);
            }
            if (level + 1 >= c.budget[b]) row.tree.asked.clear();
        }
    }
    for (int64_t b = 0; b < c.rows; b++) choose(c, trees[b], b, *l.model, bf16 ? 2 : 4);
}

}  // namespace foretell
