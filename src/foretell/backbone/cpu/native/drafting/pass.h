// The nodes of one pass over some rows, collected row by row into the tables that the layers read.
#pragma once
#include <vector>

#include "common.h"

namespace foretell {

struct Pass {
    std::vector<int32_t> sequence, node, cache_row, length, offset{0}, parents, position;

    // Adds one row's tree, given by its parents and depths, after `committed` slots; the nodes from `first` on take part.
    void add(int64_t row, int64_t committed, const std::vector<int32_t>& tree, const std::vector<int32_t>& depth,
             int64_t first) {
        for (int64_t i = 0; i < (int64_t)tree.size(); i++) {
            parents.push_back(tree[i]);
            if (i < first) continue;
            sequence.push_back((int32_t)cache_row.size()), node.push_back((int32_t)i);
            position.push_back((int32_t)committed + depth[i]);
        }
        cache_row.push_back((int32_t)row), length.push_back((int32_t)committed);
        offset.push_back((int32_t)parents.size());
    }
    void add_chain(int64_t row, int64_t committed, int64_t count) {
        std::vector<int32_t> parent(count), depth(count);
        for (int32_t i = 0; i < count; i++) parent[i] = i - 1, depth[i] = i;
        add(row, committed, parent, depth, 0);
    }
    int64_t count() const { return node.size(); }
    Rows rows(const float* cosine, const float* sine) const {
        return {count(), (int64_t)cache_row.size(), sequence.data(), node.data(), cache_row.data(), length.data(),
                offset.data(), parents.data(), position.data(), cosine, sine};
    }
};

}  // namespace foretell
