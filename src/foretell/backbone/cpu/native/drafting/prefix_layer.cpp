// A drafter's own layer over newly committed states in one call: the twin of PrefixLayer in drafting/prefix_layer.py. After a
// pass of the backbone, fusing, describing the nodes and the layer would each cost the interpreter a tenth of a millisecond.
#include <cstring>
#include <vector>

#include "common.h"

namespace foretell {

// hidden += W·[other streams; embeddings], each input divided by its root mean square.
static void fuse(const Kernels& build, const Model& model, const PrefixRequest& request, int64_t count, float* hidden,
                 int bf16) {
    int64_t d = model.hidden, inputs = request.others + 1;
    std::vector<float> embedded(count * d), normed(count * inputs * d), added(count * d);
    build.rows(*request.embedding, request.following, count, embedded.data());
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < inputs; i++) {
            const float* from = i < request.others ? request.stream[i] : embedded.data();
            build.norm(from + m * d, nullptr, 1e-6, 1, d, normed.data() + (m * inputs + i) * d);
        }
    build.linear(normed.data(), count, *request.fuse, nullptr, added.data(), 0, nullptr, nullptr, 0, model.threads, bf16);
    for (int64_t i = 0; i < count * d; i++) hidden[i] += added[i];
}

void run_prefix_layer(const Kernels& build, const Model& model, const Cache& cache, const PrefixRequest& request,
                      float* hidden, int bf16) {
    std::vector<int32_t> sequence, node, cache_row, length, offset{0}, parents, position;
    for (int64_t b = 0; b < request.sequences; b++) {
        for (int32_t i = 0; i < request.count[b]; i++) {
            sequence.push_back((int32_t)b), node.push_back(i), parents.push_back(i - 1);
            position.push_back((int32_t)request.length[b] + i);
        }
        cache_row.push_back((int32_t)request.cache_row[b]), length.push_back((int32_t)request.length[b]);
        offset.push_back((int32_t)node.size());
    }
    int64_t count = node.size();
    if (request.fuse) fuse(build, model, request, count, hidden, bf16);
    Rows rows{count, request.sequences, sequence.data(), node.data(), cache_row.data(), length.data(), offset.data(),
              parents.data(), position.data(), nullptr, request.cosine, request.sine};
    float* taps[2] = {};
    build.layers(model, cache, rows, Span{0, 1, nullptr, taps, nullptr}, hidden, bf16);
}

}  // namespace foretell
