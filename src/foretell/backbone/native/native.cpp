// The C face of the kernels: picks the best build for this processor, runs it on a team of threads, and takes
// plain pointers, so that Python reaches it with ctypes and no header of PyTorch or Python is needed.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

#include "common.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foretell {

// ---- Threads: a team of our own. A waiting thread spins for as long as the parts of a step are out of balance and
// then sleeps: a thread that burnt its share of a busy core would be the one kept waiting when its turn comes.
// PyTorch's OpenMP team has other manners, so nothing in a step may call on it.

constexpr int kSpins = 2000;  // tens of microseconds

static void wait_while(const std::atomic<int>& value, int old) {
    for (int spins = 0; spins < kSpins; spins++) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    value.wait(old, std::memory_order_acquire);
}

static std::atomic<int> arrived{0}, rounds{0};  // the barrier

void wait(int64_t threads) {
    if (threads == 1) return;
    int now = rounds.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) < (int)threads - 1) return wait_while(rounds, now);
    arrived.store(0, std::memory_order_relaxed);
    rounds.store(now + 1, std::memory_order_release);
    rounds.notify_all();
}

struct Team {
    // `round` counts in steps of kMaxThreads; the rest is how many threads the round wants. One number, so that a
    // thread that wakes late for a round that went on without it cannot take the next round's threads for this one's.
    std::atomic<int> round{0}, running{0};
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;
    std::vector<std::thread> threads;

    void work(int id, int seen) {
        for (;;) {
            wait_while(round, seen);
            seen = round.load(std::memory_order_acquire);
            if (id >= seen % kMaxThreads) continue;
            body(context, id);
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) running.notify_one();
        }
    }
    void run(int count, void (*b)(void*, int64_t), void* c) {
        while ((int)threads.size() < count - 1) {
            int id = (int)threads.size() + 1;
            threads.emplace_back([this, id, now = round.load()] { work(id, now); });
        }
        body = b, context = c;
        running.store(count - 1, std::memory_order_relaxed);
        int now = round.load(std::memory_order_relaxed) / kMaxThreads;
        round.store((now + 1) % (INT32_MAX / kMaxThreads) * kMaxThreads + count, std::memory_order_release);
        round.notify_all();
        b(c, 0);
        for (int left; (left = running.load(std::memory_order_acquire));) wait_while(running, left);
    }
};

static Team* team = new Team;  // never destroyed: its threads may outlive static destructors
static std::mutex one_call;    // scratch, team and barrier belong to one call at a time

// A forked child has none of the parent's threads: it begins with a team of its own. The parent forks between calls.
[[maybe_unused]] static const int forking = pthread_atfork(
    [] { one_call.lock(); }, [] { one_call.unlock(); },
    [] {
        team = new Team;
        arrived.store(0), rounds.store(0);
        one_call.unlock();
    });

void parallel(int64_t threads, void (*body)(void*, int64_t), void* context) {
    if (threads == 1) return body(context, 0);
    team->run((int)threads, body, context);
}

void* scratch(int64_t thread, int purpose, int64_t bytes) {
    static struct { void* data; int64_t bytes; } blocks[kMaxThreads][kPurposes];
    auto& block = blocks[thread][purpose];
    if (block.bytes < bytes) {
        free(block.data);
        block.bytes = (bytes + bytes / 4 + 127) / 64 * 64;
        block.data = aligned_alloc(64, block.bytes);
        memset(block.data, 0, block.bytes);
    }
    return block.data;
}

// ---- Instruction sets.

#if defined(__x86_64__)
static unsigned long long xgetbv0() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

static bool tiles_allowed() {  // Linux hands out tile registers on request
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

static const Kernels* find(const char* wanted) {
    unsigned a, b, c, d;
    bool avx2 = false, avx512 = false, quads = false, dot = false, tiles = false;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) {
        unsigned long long state = xgetbv0();
        bool fma3 = c >> 12 & 1, f16c = c >> 29 & 1;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
            bool wide = (state & 0xe6) == 0xe6;
            avx2 = (state & 6) == 6 && (b >> 5 & 1) && fma3 && f16c;
            avx512 = avx2 && wide && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
            quads = c >> 11 & 1;
            bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (state >> 17 & 3) == 3;
            if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) dot = avx512 && quads && (a >> 5 & 1);
            tiles = dot && amx;
        }
    }
    const Kernels* builds[] = {tiles ? kernels_amx() : nullptr, dot ? kernels_avx512bf16() : nullptr,
                               avx512 ? kernels_avx512() : nullptr, avx2 ? kernels_avx2() : nullptr, kernels_generic()};
    for (const Kernels* build : builds) {
        if (!build || (wanted && *wanted && strcmp(wanted, build->name))) continue;
        if (!strcmp(build->name, "amx") && !tiles_allowed()) continue;
        return build;
    }
    return nullptr;
}
#else
static const Kernels* find(const char* wanted) {
    const Kernels* build = kernels_generic();
    return wanted && *wanted && strcmp(wanted, build->name) ? nullptr : build;
}
#endif

}  // namespace foretell

using namespace foretell;

#pragma GCC visibility push(default)
extern "C" {

// Counts changes of the structures in common.h and of the calls below; Python refuses a library with another number.
int foretell_layout() { return 12; }

// A build by name, or the best one for an empty name; null if this processor cannot run it.
const Kernels* foretell_build(const char* name) { return find(name); }
const char* foretell_name(const Kernels* build) { return build->name; }

void foretell_pack(const Kernels* build, const void* weight, int64_t outputs, int64_t inputs, void* packed, int kind) {
    build->pack(weight, outputs, inputs, packed, kind);
}

void foretell_unpack_rows(const Kernels* build, const void* packed, int64_t inputs, const int64_t* ids, int64_t count,
                          float* out, int bf16) {
    build->unpack_rows(packed, inputs, ids, count, out, bf16);
}

// input and hidden are [M, d]; input is left as it is.
void foretell_layers(const Kernels* build, const Model* model, const Cache* cache, const Rows* rows, const Span* span,
                     const float* input, float* hidden, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    memcpy(hidden, input, rows->count * model->hidden * 4);
    build->layers(*model, *cache, *rows, *span, hidden, bf16);
}

void foretell_norm(const Kernels* build, const float* x, const float* weight, double eps, int64_t rows, int64_t width,
                   float* out) {
    build->norm(x, weight, eps, rows, width, out);
}

void foretell_linear(const Kernels* build, const float* x, int64_t rows, int64_t inputs, const void* packed,
                     int64_t outputs, const float* bias, float* out, int64_t count, float* values, int64_t* best,
                     int64_t threads, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    build->linear(x, rows, inputs, packed, outputs, bias, out, count, values, best, threads, bf16);
}

// parts are rows x (inputs / hidden) pointers; values and best are [heads, rows, count]. states, if not null, gets what
// the output matrices read, [rows, heads, hidden].
void foretell_heads(const Kernels* build, const Heads* heads, const float* const* parts, int64_t rows, int64_t count,
                    float* values, int64_t* best, float* states, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    build->heads(*heads, parts, rows, count, values, best, states, bf16);
}

// states and hidden are [M, d]; states are left as they are.
void foretell_observe(const Kernels* build, const Model* model, const Cache* cache, const Committed* committed,
                      const float* states, int64_t count, float* hidden, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    memcpy(hidden, states, count * model->hidden * 4);
    observe(*build, *model, *cache, *committed, hidden, bf16);
}

void foretell_grow(const Kernels* build, const Drafting* drafting, const Wanted* wanted, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    grow(*build, *drafting, *wanted, bf16);
}

void foretell_climb(const Kernels* build, const Lower* lower, const Climb* wanted, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    climb(*build, *lower, *wanted, bf16);
}

void foretell_attention(const Kernels* build, const Model* model, const Cache* cache, const Rows* rows,
                        const void* queries, void* out, int64_t repeats, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    build->attention(*model, *cache, *rows, queries, out, repeats, bf16);
}

}  // extern "C"
#pragma GCC visibility pop
