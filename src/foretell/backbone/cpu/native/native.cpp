// The C face of the kernels: picks the best build for this processor, runs it on a team of threads, and takes
// plain pointers, so that Python reaches it with ctypes and no header of PyTorch or Python is needed.
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <pthread.h>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
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

template <class Number>
static void wait_while(const std::atomic<Number>& value, Number old) {
    for (int spins = 0; spins < kSpins; spins++) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    value.wait(old, std::memory_order_acquire);
}

static std::atomic<int> arrived{0}, rounds{0};  // the barrier
static std::atomic<bool> broken{false};         // a thread left its body with an exception: nobody may wait for it

struct Broken : std::exception {};

static void break_barrier() {
    broken.store(true, std::memory_order_release);
    rounds.fetch_add(1, std::memory_order_acq_rel);
    rounds.notify_all();
}

static void mend_barrier() { arrived.store(0), rounds.store(0), broken.store(false); }

void wait(int64_t threads) {
    if (threads == 1) return;
    int now = rounds.load(std::memory_order_acquire);
    if (broken.load(std::memory_order_acquire)) throw Broken();
    if (arrived.fetch_add(1, std::memory_order_acq_rel) < (int)threads - 1) {
        wait_while(rounds, now);
        if (broken.load(std::memory_order_acquire)) throw Broken();
        return;
    }
    arrived.store(0, std::memory_order_relaxed);
    rounds.store(now + 1, std::memory_order_release);
    rounds.notify_all();
}

struct Team {
    // `round` counts in steps of kMaxThreads; the rest is how many threads the round wants. One number, so that a
    // thread that wakes late for a round that went on without it cannot take the next round's threads for this one's;
    // of 64 bits, so that it never comes round to what a sleeping thread saw last.
    std::atomic<int64_t> round{0};
    std::atomic<int> running{0};
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;
    std::vector<std::thread> threads;
    std::mutex failing;
    std::exception_ptr failure;  // the first of this round

    // No exception may leave a thread. Those of the others waiting at the barrier follow from the first, which counts.
    void run_body(int id) {
        try {
            body(context, id);
        } catch (...) {
            {
                std::lock_guard<std::mutex> lock(failing);
                if (!failure) failure = std::current_exception();
            }
            break_barrier();
        }
    }
    void work(int id, int64_t seen) {
        for (;;) {
            wait_while(round, seen);
            seen = round.load(std::memory_order_acquire);
            if (id >= seen % kMaxThreads) continue;
            run_body(id);
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) running.notify_one();
        }
    }
    // Starts threads until there are `count` with the caller, or the system gives no more; returns how many there are.
    int recruit(int count) {
        if ((int)threads.size() >= count - 1) return count;
        // signals are the interpreter's: its threads answer them, ours never do (but for faults of their own)
        sigset_t ours, before;
        sigfillset(&ours);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&ours, fault);
        pthread_sigmask(SIG_SETMASK, &ours, &before);
        try {
            while ((int)threads.size() < count - 1) {
                int id = (int)threads.size() + 1;
                threads.emplace_back([this, id, now = round.load()] { work(id, now); });
            }
        } catch (const std::system_error&) {  // a limit on threads
        } catch (const std::bad_alloc&) {     // no room for another stack
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return (int)threads.size() + 1;
    }
    void run(int count, void (*b)(void*, int64_t), void* c) {
        body = b, context = c;
        running.store(count - 1, std::memory_order_relaxed);
        int64_t now = round.load(std::memory_order_relaxed) / kMaxThreads;
        round.store((now + 1) * kMaxThreads + count);  // in order with what notify_all reads: who sleeps on it
        round.notify_all();
        run_body(0);
        for (int left; (left = running.load(std::memory_order_acquire));) wait_while(running, left);
        if (!failure) return;
        mend_barrier();
        std::rethrow_exception(std::exchange(failure, nullptr));
    }
};

static Team* team = new Team;  // never destroyed: its threads may outlive static destructors
static std::mutex one_call;    // scratch, team and barrier belong to one call at a time

// A forked child has none of the parent's threads: it begins with a team of its own. The parent forks between calls.
// The new team takes the old one's place, for memory may have run out; the old one's threads are not there to miss it.
[[maybe_unused]] static const int forking = pthread_atfork(
    [] { one_call.lock(); }, [] { one_call.unlock(); },
    [] {
        new (team) Team;
        mend_barrier();
        one_call.unlock();
    });

int64_t recruit(int64_t threads) {
    return threads <= 1 ? 1 : team->recruit((int)std::min<int64_t>(threads, kMaxThreads - 1));
}

void parallel(int64_t threads, void (*body)(void*, int64_t), void* context) {
    if (threads == 1) return body(context, 0);
    team->run((int)threads, body, context);
}

void* scratch(int64_t thread, int purpose, int64_t bytes) {
    static struct { void* data; int64_t bytes; } blocks[kMaxThreads][kPurposes];
    auto& block = blocks[thread][purpose];
    if (block.bytes < bytes) {
        free(block.data);
        block = {nullptr, 0};
        int64_t wanted = (bytes + bytes / 4 + 127) / 64 * 64;
        void* data = aligned_alloc(64, wanted);
        if (!data) throw std::bad_alloc();
        block = {memset(data, 0, wanted), wanted};
    }
    return block.data;
}

static std::atomic<const char*> last{""};  // the build whose code ran last

void ran(const char* build) { last = build; }

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

// The structures of common.h as Python fills them: words of 64 bits without gaps.
static_assert(sizeof(Layer) == 13 * 8 && sizeof(Model) == 8 * 8 && sizeof(Cache) == 5 * 8 && sizeof(Rows) == 11 * 8);
static_assert(sizeof(Span) == 4 * 8 && sizeof(Heads) == 13 * 8 && sizeof(Committed) == 12 * 8);
static_assert(sizeof(Drafting) == 11 * 8 && sizeof(Wanted) == 10 * 8 && sizeof(Lower) == 11 * 8);
static_assert(sizeof(Climb) == 27 * 8);

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

// Counts changes of the structures in common.h and of the calls below; Python refuses a library with another number.
int foretell_layout() { return 12; }

// A build by name, or the best one for an empty name; null if this processor cannot run it.
const Kernels* foretell_build(const char* name) { return find(name); }
const char* foretell_name(const Kernels* build) { return build->name; }
// The name of the build whose code the last call ran: a test asks for it.
const char* foretell_last_build() { return last; }
const char* foretell_message() { return message; }

// All others return what `guarded` says, and may have written anything to their outputs where that is not 0.

int foretell_pack(const Kernels* build, const void* weight, int64_t outputs, int64_t inputs, void* packed, int kind) {
    return guarded([&] { build->pack(weight, outputs, inputs, packed, kind); });
}

int foretell_unpack_rows(const Kernels* build, const void* packed, int64_t inputs, const int64_t* ids, int64_t count,
                         float* out, int bf16) {
    return guarded([&] { build->unpack_rows(packed, inputs, ids, count, out, bf16); });
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
int foretell_linear(const Kernels* build, const float* x, int64_t rows, int64_t inputs, const void* packed,
                    int64_t outputs, const float* bias, float* out, int64_t count, float* values, int64_t* best,
                    int strict, int64_t threads, int bf16) {
    return alone([&] {
        build->linear(x, rows, inputs, packed, outputs, bias, out, count, values, best, strict, threads, bf16);
    });
}

// Row r reads those of `store` [*, hidden] that which[r] names, inputs / hidden of them; values and best are [heads, rows,
// count]. states, if not null, gets what the output matrices read, [rows, heads, hidden].
int foretell_heads(const Kernels* build, const Heads* heads, const float* store, const int64_t* which, int64_t rows,
                   int64_t count, float* values, int64_t* best, float* states, int bf16) {
    return alone([&] {
        std::vector<const float*> parts(rows * (heads->inputs / heads->hidden));
        for (size_t i = 0; i < parts.size(); i++) parts[i] = store + which[i] * heads->hidden;
        build->heads(*heads, parts.data(), rows, count, values, best, states, bf16);
    });
}

// states and hidden are [M, d]; states are left as they are.
int foretell_observe(const Kernels* build, const Model* model, const Cache* cache, const Committed* committed,
                     const float* states, int64_t count, float* hidden, int bf16) {
    return alone([&] {
        memcpy(hidden, states, count * model->hidden * 4);
        observe(*build, *model, *cache, *committed, hidden, bf16);
    });
}

int foretell_grow(const Kernels* build, const Drafting* drafting, const Wanted* wanted, int bf16) {
    return alone([&] { grow(*build, *drafting, *wanted, bf16); });
}

int foretell_climb(const Kernels* build, const Lower* lower, const Climb* wanted, int bf16) {
    return alone([&] { climb(*build, *lower, *wanted, bf16); });
}

int foretell_attention(const Kernels* build, const Model* model, const Cache* cache, const Rows* rows,
                       const void* queries, void* out, int64_t repeats, int bf16) {
    return alone([&] { build->attention(*model, *cache, *rows, queries, out, repeats, bf16); });
}

}  // extern "C"
#pragma GCC visibility pop
