// The C face of the kernels: picks the best build for this processor and takes plain pointers, so that Python reaches it
// with ctypes and no header of PyTorch or Python is needed.
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common.h"
#include "threads.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace foretell {

static std::atomic<const char*> last{""};  // the build whose code ran last

void ran(const char* build) { last = build; }

// ---- Instruction sets.

using Builds = std::array<const Kernels*, 7>;  // those that this processor can run, the best one first; null for others

#if defined(__x86_64__)
static unsigned long long xgetbv0() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

static bool tiles_allowed() {  // Linux hands out tile registers on request
#if defined(__linux__)
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

static Builds builds() {
    unsigned a, b, c, d;
    bool avx2 = false, vnni = false, avx512 = false, quads = false, dot = false, tiles = false;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) {
        unsigned long long state = xgetbv0();
        bool fma3 = c >> 12 & 1, f16c = c >> 29 & 1;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
            bool wide = (state & 0xe6) == 0xe6;
            avx2 = (state & 6) == 6 && (b >> 5 & 1) && fma3 && f16c;
            avx512 = avx2 && wide && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
            quads = avx512 && (c >> 11 & 1);
            bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (state >> 17 & 3) == 3;
            if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
                vnni = avx2 && (a >> 4 & 1);
                dot = quads && (a >> 5 & 1);
            }
            tiles = dot && amx;
        }
    }
    return {tiles ? kernels_amx() : nullptr, dot ? kernels_avx512bf16() : nullptr,
            quads ? kernels_avx512vnni() : nullptr, avx512 ? kernels_avx512() : nullptr,
            vnni ? kernels_avxvnni() : nullptr, avx2 ? kernels_avx2() : nullptr, kernels_generic()};
}
#elif defined(__aarch64__)
#if defined(__linux__)
static bool has_dots() { return getauxval(AT_HWCAP) >> 20 & 1; }
static bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
static bool has(const char* feature) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found;
}
static bool has_dots() { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else
static bool has_dots() { return false; }
static bool has_i8mm() { return false; }
#endif

static Builds builds() {
    bool dots = has_dots();
    return {dots && has_i8mm() ? kernels_i8mm() : nullptr, dots ? kernels_dotprod() : nullptr, kernels_neon(),
            kernels_generic()};
}
#else
static Builds builds() { return {kernels_generic()}; }
#endif

static const Kernels* find(const char* wanted) {
    for (const Kernels* build : builds()) {
        if (!build || (wanted && *wanted && strcmp(wanted, build->name))) continue;
#if defined(__x86_64__)
        if (!strcmp(build->name, "amx") && !tiles_allowed()) continue;
#endif
        return build;
    }
    return nullptr;
}

}  // namespace foretell

using namespace foretell;

// What went wrong in the last call of this thread.
static thread_local char message[256];

// Runs the body of an exported function: an exception that left it would end the process.
// Returns 0; 1 if there was not enough memory; 2 for anything else, which `message` names.
template <class Body>
static int guarded(Body body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        snprintf(message, sizeof message, "there was not enough memory");
        return 1;
    } catch (const std::length_error&) {  // what containers throw at sizes beyond any memory
        snprintf(message, sizeof message, "there was not enough memory");
        return 1;
    } catch (const std::exception& error) {
        snprintf(message, sizeof message, "%s", error.what());
    } catch (...) {
        snprintf(message, sizeof message, "an unknown exception");
    }
    return 2;
}

// The same for what uses scratch and the team: one call at a time.
template <class Body>
static int alone(Body body) noexcept {
    return guarded([&] {
        std::lock_guard<std::mutex> lock(one_call);
        body();
    });
}

#pragma GCC visibility push(default)
extern "C" {

// A build by name, or the best one for an empty name; null if this processor cannot run it.
const Kernels* foretell_build(const char* name) { return find(name); }
const char* foretell_name(const Kernels* build) { return build->name; }
// The number of a weight format of products/formats.inc, or -1.
int64_t foretell_format(const Kernels* build, const char* name) { return build->format(name); }
// The name of the build whose code the last call ran: for tests.
const char* foretell_last_build() { return last; }
const char* foretell_message() { return message; }
// How many threads the machine has room for at present: for tests.
int64_t foretell_room() { return room(); }

// All others return what `guarded` says, and may have written anything to their outputs where that is not 0.

int foretell_sizes(const Kernels* build, const Matrix* matrix, int64_t* sizes) {
    return guarded([&] { build->sizes(*matrix, sizes); });
}

int foretell_pack(const Kernels* build, const void* weight, const Matrix* matrix) {
    return guarded([&] { build->pack(weight, *matrix); });
}

int foretell_rows(const Kernels* build, const Matrix* matrix, const int64_t* ids, int64_t count, float* out) {
    return guarded([&] { build->rows(*matrix, ids, count, out); });
}

// input and hidden are [M, d]; input is left as it is.
int foretell_layers(const Kernels* build, const Model* model, const Cache* cache, const Rows* rows, const Span* span,
                    const float* input, float* hidden, int bf16) {
    return alone([&] {
        memcpy(hidden, input, rows->count * model->hidden * 4);
        build->layers(*model, *cache, *rows, *span, hidden, bf16);
    });
}

int foretell_norm(const Kernels* build, const float* x, const float* weight, double eps, int64_t rows, int64_t width,
                  float* out) {
    return guarded([&] { build->norm(x, weight, eps, rows, width, out); });
}

// The `count` best are written to values and best, [rows, count]; with `strict` the best of a row whose outputs are not
// all finite numbers is -1.
int foretell_linear(const Kernels* build, const float* x, int64_t rows, const Matrix* matrix, const float* bias,
                    float* out, int64_t count, float* values, int64_t* best, int strict, int64_t threads, int bf16) {
    return alone([&] { build->linear(x, rows, *matrix, bias, out, count, values, best, strict, threads, bf16); });
}

// Row r reads those of `store` [*, hidden] that which[r] names, inputs / hidden of them; values and best are [heads, rows,
// count]. states, if not null, gets what the output matrices read, [rows, heads, hidden].
int foretell_heads(const Kernels* build, const Heads* heads, const float* store, const int64_t* which, int64_t rows,
                   int64_t count, float* values, int64_t* best, int bf16) {
    return alone([&] {
        std::vector<const float*> inputs(rows * (heads->inputs / heads->hidden));
        for (size_t i = 0; i < inputs.size(); i++) inputs[i] = store + which[i] * heads->hidden;
        build->heads(*heads, inputs.data(), rows, count, values, best, bf16);
    });
}

// states and hidden are [M, d]; states are left as they are.
int foretell_prefix_layer(const Kernels* build, const Model* model, const Cache* cache, const PrefixRequest* request,
                          const float* states, int64_t count, float* hidden, int bf16) {
    return alone([&] {
        memcpy(hidden, states, count * model->hidden * 4);
        run_prefix_layer(*build, *model, *cache, *request, hidden, bf16);
    });
}

int foretell_grow(const Kernels* build, const LevelDrafting* drafting, const LevelRequest* request, int bf16) {
    return alone([&] { grow(*build, *drafting, *request, bf16); });
}

int foretell_grow_through_layers(const Kernels* build, const LowerLayers* lower, const DraftRequest* request, int bf16) {
    return alone([&] { grow_through_layers(*build, *lower, *request, bf16); });
}

int foretell_attention(const Kernels* build, const Model* model, const Cache* cache, const Rows* rows,
                       const void* queries, void* out, int64_t repeats, int bf16) {
    return alone([&] { build->attention(*model, *cache, *rows, queries, out, repeats, bf16); });
}

}  // extern "C"
#pragma GCC visibility pop

// ---- What Python has to know: its ctypes structures and argument lists are compared with this text when it loads, so
// that neither side can change alone. A member that is missing here does not compile.

struct Field {
    const char* name;
    char kind;
    size_t offset, size;
};

// p: pointer, n: int64_t, i: int, d: double, s: a structure
template <class T>
constexpr char kind_of() {
    if (std::is_class_v<T>) return 's';
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_floating_point_v<T>) return 'd';
    return sizeof(T) == 8 ? 'n' : 'i';
}

template <size_t N>
constexpr bool covers(const Field (&fields)[N], size_t size) {  // all members, in order, without gaps
    size_t end = 0;
    for (const Field& field : fields) {
        if (field.offset != end) return false;
        end += field.size;
    }
    return end == size;
}

template <size_t N>
static std::string structure(const char* name, const Field (&fields)[N], size_t size) {
    std::string line = name + (" " + std::to_string(size)) + ":";
    for (const Field& field : fields)
        line += " " + std::string(field.name) + "@" + std::to_string(field.offset) + field.kind;
    return line + "\n";
}

template <class Result, class... Arguments>
static std::string call(const char* name, Result (*)(Arguments...)) {
    return name + (" " + std::string{kind_of<Arguments>()...}) + "\n";
}

#define FIELD(name) Field{#name, kind_of<decltype(S::name)>(), offsetof(S, name), sizeof(S::name)}
#define STRUCTURE(name, ...)                                                              \
    [] {                                                                                  \
        using S = name;                                                                   \
        static constexpr Field fields[] = {__VA_ARGS__};                                  \
        static_assert(covers(fields, sizeof(S)), #name ": not all members are described"); \
        return structure(#name, fields, sizeof(S));                                       \
    }()
#define CALL(name) call(#name, foretell_##name)

static const std::string& described() {
    static const std::string text =
        STRUCTURE(Matrix, FIELD(blocks), FIELD(scale), FIELD(format), FIELD(outputs), FIELD(inputs),
                  FIELD(rest)) +
        STRUCTURE(Layer, FIELD(attention_norm), FIELD(qkv), FIELD(qkv_bias), FIELD(query_norm), FIELD(key_norm),
                  FIELD(out), FIELD(out_bias), FIELD(mlp_norm), FIELD(gate_up), FIELD(gate_up_bias), FIELD(down),
                  FIELD(down_bias), FIELD(window)) +
        STRUCTURE(Model, FIELD(hidden), FIELD(heads), FIELD(kv_heads), FIELD(head_dim), FIELD(mlp), FIELD(threads),
                  FIELD(eps), FIELD(layers)) +
        STRUCTURE(Cache, FIELD(keys), FIELD(values), FIELD(layer_stride), FIELD(starts), FIELD(head_stride)) +
        STRUCTURE(Rows, FIELD(count), FIELD(sequences), FIELD(sequence), FIELD(node), FIELD(cache_row),
                  FIELD(length), FIELD(offset), FIELD(parents), FIELD(position), FIELD(shadow), FIELD(cosine),
                  FIELD(sine)) +
        STRUCTURE(Beside, FIELD(count), FIELD(rank), FIELD(rows), FIELD(down), FIELD(up)) +
        STRUCTURE(Span, FIELD(begin), FIELD(end), FIELD(skip), FIELD(taps), FIELD(beside)) +
        STRUCTURE(Heads, FIELD(heads), FIELD(hidden), FIELD(inputs), FIELD(layers), FIELD(linear), FIELD(outputs),
                  FIELD(choices), FIELD(threads), FIELD(weight), FIELD(bias), FIELD(output)) +
        STRUCTURE(PrefixRequest, FIELD(sequences), FIELD(cache_row), FIELD(length), FIELD(count), FIELD(cosine),
                  FIELD(sine), FIELD(fuse), FIELD(others), FIELD(stream), FIELD(following), FIELD(embedding)) +
        STRUCTURE(LevelDrafting, FIELD(levels), FIELD(hidden), FIELD(streams), FIELD(width),
                  FIELD(heads), FIELD(embedding), FIELD(vocabulary), FIELD(scales)) +
        STRUCTURE(LevelRequest, FIELD(rows), FIELD(count), FIELD(beam), FIELD(min_gain), FIELD(states), FIELD(roots),
                  FIELD(sizes), FIELD(parents), FIELD(tokens), FIELD(cond_probs)) +
        STRUCTURE(LowerLayers, FIELD(model), FIELD(adapter), FIELD(skip), FIELD(norm), FIELD(eps), FIELD(head),
                  FIELD(width), FIELD(vocabulary), FIELD(scale), FIELD(embedding), FIELD(rank),
                  FIELD(down), FIELD(up)) +
        STRUCTURE(DraftRequest, FIELD(rows), FIELD(layers), FIELD(count), FIELD(steps), FIELD(room), FIELD(beam),
                  FIELD(min_gain), FIELD(thresholds), FIELD(roots), FIELD(budget), FIELD(cache_row), FIELD(length),
                  FIELD(own_length), FIELD(waiting), FIELD(states), FIELD(cosine), FIELD(sine), FIELD(cache),
                  FIELD(own), FIELD(sizes), FIELD(ran), FIELD(positions), FIELD(parents), FIELD(tokens),
                  FIELD(cond_probs), FIELD(hidden), FIELD(tapped)) +
        CALL(sizes) + CALL(pack) + CALL(rows) + CALL(layers) + CALL(norm) + CALL(linear) + CALL(heads) +
        CALL(prefix_layer) + CALL(grow) + CALL(grow_through_layers) + CALL(attention);
    return text;
}

#pragma GCC visibility push(default)
extern "C" const char* foretell_layout_text() { return described().c_str(); }
#pragma GCC visibility pop
