// The C face of the kernels: picks the best build for this processor, runs it on a team of threads, and takes
// plain pointers, so that Python reaches it with ctypes and no header of PyTorch or Python is needed.
#include <dlfcn.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "common.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foretell {

// ---- Threads. PyTorch's own OpenMP team is used when it can be found: two teams would fight for the cores, since
// idle OpenMP threads spin. Otherwise a small pool of our own.

static std::atomic<int64_t> barrier_count{0}, barrier_round{0};

void wait(int64_t threads) {
    if (threads == 1) return;
    int64_t round = barrier_round.load(std::memory_order_acquire);
    if (barrier_count.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        barrier_count.store(0, std::memory_order_relaxed);
        barrier_round.store(round + 1, std::memory_order_release);
        return;
    }
    for (int64_t spins = 0; barrier_round.load(std::memory_order_acquire) == round; spins++) {
        if (spins > 2000) sched_yield();  // somebody else needs this core
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

struct Pool {
    std::mutex mutex;
    std::condition_variable wake, done;
    std::vector<std::thread> threads;
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int64_t round = 0, running = 0, wanted = 0;

    void worker(int64_t id) {
        int64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return round != seen; });
            seen = round;
            if (id >= wanted) continue;
            lock.unlock();
            body(context, id);
            lock.lock();
            if (--running == 0) done.notify_one();
        }
    }
    void run(int64_t count, void (*b)(void*, int64_t), void* c) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            while ((int64_t)threads.size() < count - 1) {
                int64_t id = (int64_t)threads.size() + 1;
                threads.emplace_back([this, id] { worker(id); });
            }
            body = b, context = c, wanted = count, running = count - 1, round++;
        }
        wake.notify_all();
        b(c, 0);
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, [&] { return running == 0; });
    }
};

static void pool_run(int64_t threads, void (*body)(void*, int64_t), void* context) {
    static Pool* pool = new Pool;  // never destroyed: its threads may outlive static destructors
    pool->run(threads, body, context);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
static GompParallel gomp_parallel;
static int (*omp_thread)();
static int (*omp_team)();

struct Region {
    void (*body)(void*, int64_t);
    void* context;
    int64_t threads;
    std::atomic<bool> refused;
};

static void region_entry(void* data) {
    Region& region = *(Region*)data;
    if (omp_team() != region.threads) {  // OpenMP gave fewer threads than the barriers count on
        region.refused = true;
        return;
    }
    region.body(region.context, omp_thread());
}

void parallel(int64_t threads, void (*body)(void*, int64_t), void* context) {
    if (threads == 1) return body(context, 0);
    if (gomp_parallel) {
        Region region{body, context, threads, {false}};
        gomp_parallel(region_entry, &region, (unsigned)threads, 0);
        if (!region.refused) return;
        gomp_parallel = nullptr;
    }
    pool_run(threads, body, context);
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
    bool avx2 = false, avx512 = false, dot = false, tiles = false;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) {
        unsigned long long state = xgetbv0();
        bool fma3 = c >> 12 & 1, f16c = c >> 29 & 1;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
            bool wide = (state & 0xe6) == 0xe6;
            avx2 = (state & 6) == 6 && (b >> 5 & 1) && fma3 && f16c;
            avx512 = avx2 && wide && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
            bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (state >> 17 & 3) == 3;
            if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) dot = avx512 && (a >> 5 & 1);
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

static const Kernels* chosen;
static std::mutex one_call;  // scratch and barriers belong to one call at a time

}  // namespace foretell

using namespace foretell;

#pragma GCC visibility push(default)
extern "C" {

// Chooses a build by name, or the best one for an empty name; null if this processor cannot run it.
const char* foretell_select(const char* name) {
    gomp_parallel = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    omp_thread = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    omp_team = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (!omp_thread || !omp_team || getenv("FORETELL_OWN_THREADS")) gomp_parallel = nullptr;
    const Kernels* found = find(name);
    if (!found) return nullptr;
    chosen = found;
    return found->name;
}

const char* foretell_team() { return gomp_parallel ? "openmp" : "own"; }

void foretell_pack(const void* weight, int64_t outputs, int64_t inputs, void* packed, int bf16) {
    chosen->pack(weight, outputs, inputs, packed, bf16);
}

void foretell_unpack_rows(const void* packed, int64_t inputs, const int64_t* ids, int64_t count, float* out, int bf16) {
    chosen->unpack_rows(packed, inputs, ids, count, out, bf16);
}

void foretell_layers(const Model* model, const Cache* cache, const Rows* rows, const Span* span, float* hidden, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    chosen->layers(*model, *cache, *rows, *span, hidden, bf16);
}

void foretell_norm(const float* x, const float* weight, double eps, int64_t rows, int64_t width, float* out) {
    chosen->norm(x, weight, eps, rows, width, out);
}

void foretell_linear(const float* x, int64_t rows, int64_t inputs, const void* packed, int64_t outputs, const float* bias,
                     float* out, int64_t* best, int64_t threads, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    chosen->linear(x, rows, inputs, packed, outputs, bias, out, best, threads, bf16);
}

void foretell_attention(const Model* model, const Cache* cache, const Rows* rows, const void* queries, void* out, int bf16) {
    std::lock_guard<std::mutex> lock(one_call);
    chosen->attention(*model, *cache, *rows, queries, out, bf16);
}

}  // extern "C"
#pragma GCC visibility pop
