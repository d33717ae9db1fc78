// A drafter's own layer over newly committed states (drafting/prefix_layer.py), in one call: fusing, the nodes of the pass, the
// layer. After a pass of the backbone each of them would cost the interpreter a tenth of a millisecond.
#include <cstring>
#include <vector>

#include "common.h"

namespace foretell {

// hidden += W·[others; embeddings], each part divided by its root mean square.
static void fuse(const Kernels& build, const Model& model, const Committed& c, int64_t count, float* hidden, int bf16) {
    int64_t d = model.hidden, parts = c.others + 1;
    std::vector<float> embedded(count * d), read(count * parts * d), added(count * d);
    build.rows(*c.embedding, c.following, count, embedded.data());
    for (int64_t m = 0; m < count; m++)
        for (int64_t p = 0; p < parts; p++) {
            const float* from = p < c.others ? c.stream[p] : embedded.data();
            build.norm(from + m * d, nullptr, 1e-6, 1, d, read.data() + (m * parts + p) * d);
        }
    build.linear(read.data(), count, *c.fuse, nullptr, added.data(), 0, nullptr, nullptr, 0, model.threads, bf16);
    for (int64_t i = 0; i < count * d; i++) hidden[i] += added[i];
}

void observe(const Kernels& build, const Model& model, const Cache& cache, const Committed& c, float* hidden, int bf16) {
    std::vector<int32_t> sequence, node, cache_row, length, offset{0}, parents, position;
    for (int64_t b = 0; b < c.sequences; b++) {
        for (int32_t i = 0; i < c.count[b]; i++) {
            sequence.push_back((int32_t)b), node.push_back(i), parents.push_back(i - 1);
            position.push_back((int32_t)c.length[b] + i);
        }
        cache_row.push_back((int32_t)c.cache_row[b]), length.push_back((int32_t)c.length[b]);
        offset.push_back((int32_t)node.size());
    }
    int64_t count = node.size();
    if (c.fuse) fuse(build, model, c, count, hidden, bf16);
    Rows rows{count, c.sequences, sequence.data(), node.data(), cache_row.data(), length.data(), offset.data(),
              parents.data(), position.data(), c.cosine, c.sine};
    float* taps[2] = {};
    build.layers(model, cache, rows, Span{0, 1, nullptr, taps}, hidden, bf16);
}

}  // namespace foretell
