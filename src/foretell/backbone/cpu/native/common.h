// What every instruction-set build of the step shares: the description of a model, of a cache and of a call.
//
// Legend: M rows of the call, d hidden width, H query heads, G key/value heads, D head width, F MLP width,
// S slots of a cache row. Pointers lead to tensors, NumPy arrays and tables that the caller keeps alive during a call, and
// those of Layer, Model, Heads, LevelDrafting and LowerLayers to what it keeps as long as they are used.
#pragma once
#include <cstdint>

namespace foretell {

// The weights of a linear layer, in one of the formats of products/formats.inc.
struct Matrix {
    const void* blocks;
    const float* scale;  // of each output, zeros up to a multiple of 32; null where the format has none
    int64_t format, outputs, inputs;
    const Matrix* rest;  // the outputs that follow these, full panels, in another format; or null
};

// One decoder layer; norms and biases are float32. A null pointer means "this model has none".
struct Layer {
    const float* attention_norm;  // [d]
    Matrix qkv;                   // (H + 2G)·D outputs from d: queries, keys, values
    const float* qkv_bias;
    const float* query_norm;  // [D] Qwen3 normalises each head
    const float* key_norm;
    Matrix out;  // d outputs from H·D
    const float* out_bias;
    const float* mlp_norm;
    Matrix gate_up;              // 2F outputs from d: 32 gate columns, then their 32 up columns, and so on
    const float* gate_up_bias;   // the same order
    Matrix down;                 // d outputs from F
    const float* down_bias;
    int64_t window;  // keys a query sees at most, its own included; 0 means all
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, mlp, threads;
    double eps;
    const Layer* layers;
};

// keys and values are [layers, G, S, D], a pool of slots in which each cache row has a stretch of its own; strides and
// starts count elements.
struct Cache {
    void* keys;
    void* values;
    int64_t layer_stride;
    const int64_t* starts;  // [cache rows]
    int64_t head_stride;
};

// The rows of one call. Sequence b owns nodes [offset[b], offset[b+1]) of `parents`; node i of its tree lies at
// slot length[b] + i, and parents count within the tree (the root's is -1). Rows name (sequence, node), sorted by sequence;
// a shadow attends to its node's own key and value in the place of its own, and writes none.
struct Rows {
    int64_t count, sequences;
    const int32_t* sequence;  // [M]
    const int32_t* node;      // [M]
    const int32_t* cache_row;  // [sequences]
    const int32_t* length;     // [sequences] committed slots
    const int32_t* offset;     // [sequences + 1]
    const int32_t* parents;
    const int32_t* position;   // [M]
    const int32_t* shadow;     // [M] whether it is one; null if none is
    const float* cosine;       // [positions, D/2]
    const float* sine;
};

// Adapters that some rows go through beside the layers: behind layer l their streams grow by up[l]·SiLU(down[l]·x), x
// being the stream in front of it divided by its root mean square.
struct Beside {
    int64_t count, rank;
    const int64_t* rows;      // [count] among the M
    const Matrix *down, *up;  // [layers] of the model; those outside the span are not read
};

// What to run: layers [begin, end); bit 0 of skip[l] skips attention, bit 1 the MLP; taps[l] (may be null)
// receives the residual stream [M, d] after l layers.
struct Span {
    int64_t begin, end;
    const uint8_t* skip;
    float* const* taps;
    const Beside* beside;  // or null
};

// Draft heads side by side: `layers` residual blocks each (the last without SiLU if `linear`), then an output matrix
// each or one for all. They read states of `hidden` numbers, `inputs` numbers in all: the first as it is, the others divided by
// their root mean square.
struct Heads {
    int64_t heads, hidden, inputs, layers, linear, outputs, choices, threads;
    const Matrix* weight;      // [layers][heads]: `hidden` outputs from `inputs` (first layer) or `hidden`
    const float* const* bias;  // [layers][heads]
    const Matrix* output;      // [outputs]: `choices` outputs from `hidden`, all of one format
};

// A drafter's own layer over newly committed states: count[b] of them follow the length[b] that the layer's cache holds of
// row cache_row[b]. With `fuse`, [d] outputs from `others` streams [M, d] and the embedding of the token after each state
// are added to them.
struct PrefixRequest {
    int64_t sequences;
    const int64_t *cache_row, *length, *count;  // [sequences]
    const float *cosine, *sine;                 // [positions, D/2]
    const Matrix* fuse;                         // or null
    int64_t others;
    const float* const* stream;  // [others]
    const int64_t* following;    // [M]
    const Matrix* embedding;     // a row per token
};

// Heads that draft a tree level by level (drafting/protocols.py): one level each, which read `streams` states of a row, then
// the embeddings of the path's tokens.
struct LevelDrafting {
    int64_t levels, hidden, streams, width;  // width: guesses of a node
    const Heads* heads;
    const Matrix* embedding;    // a row per token
    const int64_t* vocabulary;  // tokens that the heads choose from
    const float* scales;        // [levels][2] calibration of each head, or null
};

// Trees to draft level by level, at most `count` nodes each besides the root; results are [rows][count + 1].
struct LevelRequest {
    int64_t rows, count, beam;
    double min_gain;
    const float* const* states;  // [rows] -> [streams][hidden], null for a row that has none yet
    const int64_t* roots;
    int64_t* sizes;
    int64_t* parents;
    int64_t* tokens;
    double* cond_probs;  // of each node given its parent
};

// The model's own lower layers as a drafter (LowerLayerDrafting in drafting/protocols.py): an adapter over their streams, or
// a fast stream beside them, or neither, and the output matrix that reads the result after a norm.
struct LowerLayers {
    const Model* model;
    const Model* adapter;  // one layer with a cache of its own, or null
    const uint8_t* skip;   // of the adapter, see Span
    const float* norm;     // [d]
    double eps;
    const Heads* head;  // without blocks
    int64_t width;      // guesses of a node
    const int64_t* vocabulary;
    const float* scale;       // [2] calibration, or null
    const Matrix* embedding;  // a row per token
    int64_t rank;
    const Matrix *down, *up;  // [layers] adapters that the fast stream goes through (Beside); or null
};

// Trees to draft with lower layers, at most `count` nodes each besides the root. They grow in at most `steps` levels, and at
// most `room` nodes of a row pass the `layers`; the drafted ones among these come first in the result. Chains keep all of
// them, and end after a token less probable than the row's threshold.
struct DraftRequest {
    int64_t rows, layers, count, steps, room, beam;
    double min_gain;
    const double* thresholds;  // [rows], or null for trees
    const int64_t *roots, *budget, *cache_row, *length;  // [rows]
    const int64_t *own_length, *waiting;  // [rows] states in the adapter's cache, and those that it has not read yet
    const float* const* states;           // [rows] -> [waiting][d]
    const float *cosine, *sine;           // [positions, D/2]
    const Cache *cache, *own;
    int64_t *sizes, *ran;                   // [rows]: nodes of the tree, and how many of them passed the layers
    int64_t *positions, *parents, *tokens;  // [rows][count + 1]; positions: index in `hidden` of a node that passed them
    double* cond_probs;                     // of each node given its parent
    float* hidden;         // streams after the layers, in the order in which nodes ran
    float* const* tapped;  // [layers + 1] streams after so many layers, or null
};

// What one build computes. `bf16` says what activations, keys and values are rounded to: bfloat16, else float32; what
// weights are, each matrix says itself.
struct Kernels {
    const char* name;
    int64_t (*format)(const char* name);  // number of a format, or -1
    // Bytes that its panels take (0: it has none), and bytes of the weight that they are packed from.
    void (*sizes)(const Matrix&, int64_t* out);
    void (*pack)(const void* weight, const Matrix&);  // fills its blocks with the rows of a weight
    void (*rows)(const Matrix&, const int64_t* ids, int64_t count, float* out);  // of an embedding, [count][inputs]
    void (*layers)(const Model&, const Cache&, const Rows&, const Span&, float* hidden, int bf16);
    void (*norm)(const float* x, const float* weight, double eps, int64_t rows, int64_t width, float* out);
    void (*linear)(const float* x, int64_t rows, const Matrix&, const float* bias, float* out, int64_t count,
                   float* values, int64_t* best, int strict, int64_t threads, int bf16);
    void (*heads)(const Heads&, const float* const* inputs, int64_t rows, int64_t count, float* values, int64_t* best,
                  int bf16);
    void (*attention)(const Model&, const Cache&, const Rows&, const void* queries, void* out,
                      int64_t repeats, int bf16);
};

const Kernels* kernels_amx();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_avx512vnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx2();
const Kernels* kernels_i8mm();
const Kernels* kernels_dotprod();
const Kernels* kernels_neon();
const Kernels* kernels_generic();

void run_prefix_layer(const Kernels& build, const Model& model, const Cache& cache, const PrefixRequest& request,
                      float* hidden, int bf16);
void grow(const Kernels& build, const LevelDrafting& drafting, const LevelRequest& request, int bf16);
void grow_through_layers(const Kernels& build, const LowerLayers& lower, const DraftRequest& request, int bf16);

// How many of so many threads there are: fewer where the system starts no more, or has no room for them at present. Never
// more than kMaxThreads - 1.
int64_t recruit(int64_t threads);
int64_t room();
// Runs body(context, thread) on `threads` threads, which `recruit` has promised, and waits; `wait` inside a body is a
// barrier of all of them. What a body throws ends the other bodies at their next barrier, and is thrown again here.
void parallel(int64_t threads, void (*body)(void*, int64_t), void* context);
void wait(int64_t threads);
constexpr int kMaxThreads = 256;
constexpr int64_t kShared = kMaxThreads - 1;  // in place of a thread, for what all threads of a call read
// Uses of scratch memory.
enum Purpose {
    // of each thread: attention
    kKeyPanels, kValuePanels, kScores, kWeights, kQueryTile, kNearPanel, kNearWeights, kNearSlots, kMixedTile, kNearScores,
    kNodeWeights,
    // of each thread: linear layers and norms
    kWidePanel, kProduct, kNormLine,
    // shared: a step
    kNodes, kTasks, kLead, kNormed, kMixed, kActive, kNormedQ8, kMixedQ8, kActiveQ8, kQueries, kQkv,
    kBeside, kBesideQ8, kLow, kLowQ8,
    // shared: linear layers, draft heads and their best outputs
    kOperand, kOperandQ8, kHeadInputs, kHeadStreams, kHeadOperands, kHeadOperandsQ8, kHeadInt8, kHeadInt8Rows, kBestValues, kBestIndices, kBestMass,
    kBestWild,
    kPurposes
};
// Memory that lives until the process ends and only grows; one block per (thread, purpose). Throws std::bad_alloc.
void* scratch(int64_t thread, Purpose purpose, int64_t bytes);
// A build's own code names itself here, so that a test can tell which one ran.
void ran(const char* build);

}  // namespace foretell
