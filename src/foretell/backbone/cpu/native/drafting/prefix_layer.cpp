// A drafter's own layer over newly committed states (drafting/prefix_layer.py), in one call: fusing, the nodes of the pass,
// the layer. After a pass of the backbone each of them would cost the interpreter a tenth of a millisecond.
#include "drafting/pass.h"

namespace foretell {

// hidden += W·[other streams; embedding of the following token], each divided by its root mean square.
static void fuse(const Kernels& build, const Model& model, const CommittedStates& c, int64_t count, float* hidden,
                 int bf16) {
    int64_t d = model.hidden, inputs = c.others + 1;
    std::vector<float> embedded(count * d), normed(count * inputs * d), added(count * d);
    build.rows(*c.embedding, c.following, count, embedded.data());
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < inputs; i++) {
            const float* from = i < c.others ? c.stream[i] : embedded.data();
            build.norm(from + m * d, nullptr, 1e-6, 1, d, normed.data() + (m * inputs + i) * d);
        }
    build.linear(normed.data(), count, *c.fuse, nullptr, added.data(), 0, nullptr, nullptr, 0, model.threads, bf16);
    for (int64_t i = 0; i < count * d; i++) hidden[i] += added[i];
}

void prefix_layer(const Kernels& build, const Model& model, const Cache& cache, const CommittedStates& c, float* hidden,
                  int bf16) {
    Pass pass;
    for (int64_t b = 0; b < c.sequences; b++) pass.add_chain(c.cache_row[b], c.length[b], c.count[b]);
    if (c.fuse) fuse(build, model, c, pass.count(), hidden, bf16);
    float* taps[2] = {};
    build.layers(model, cache, pass.rows(c.cosine, c.sine), Span{0, 1, nullptr, taps}, hidden, bf16);
}

}  // namespace foretell
