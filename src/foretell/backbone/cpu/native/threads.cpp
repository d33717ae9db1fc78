// Threads of our own for the kernels, and the memory that they keep from call to call.
//
// A waiting thread spins for as long as the parts of a step are out of balance and then sleeps: a thread that burnt its
// share of a busy core would be the one kept waiting when its turn comes. PyTorch's OpenMP team behaves otherwise, so
// nothing in a step may call on it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <pthread.h>
#include <sys/resource.h>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "common.h"
#include "room.h"
#include "threads.h"

namespace foretell {

constexpr int kSpins = 2000;  // tens of microseconds

template <class Number>
static void wait_while(const std::atomic<Number>& value, Number old) {
    for (int spins = 0; spins < kSpins; spins++) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");  // takes about as long as x86's pause; `yield` takes none on most processors
#endif
    }
    value.wait(old, std::memory_order_acquire);
}

static std::atomic<int> arrived{0}, rounds{0};  // the barrier
static std::atomic<bool> broken{false};         // a thread left its body with an exception: nothing may wait for it

struct Broken : std::exception {};

static void break_barrier() {
    broken.store(true, std::memory_order_release);
    rounds.fetch_add(1);
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
    rounds.store(now + 1);  // sequentially consistent: notify_all reads then whether anybody sleeps, and may not miss it
    rounds.notify_all();
}

// How often this thread had to leave its core to another.
static int64_t times_lost() {
#ifdef RUSAGE_THREAD
    rusage used;
    if (!getrusage(RUSAGE_THREAD, &used)) return used.ru_nivcsw;
#endif
    return 0;
}

struct Team {
    Room room;
    Cores cores;
    // `round` counts in steps of kMaxThreads; the rest is how many threads the round wants. One number, so that a
    // thread that wakes late for a round that went on without it cannot take the next round's threads for this one's;
    // of 64 bits, so that it never comes round to what a sleeping thread saw last.
    std::atomic<int64_t> round{0};
    std::atomic<int> running{0};
    void (*body)(void*, int64_t) = nullptr;
    void* context = nullptr;
    std::vector<std::thread> threads;
    std::atomic<int> wanted[kMaxThreads]{};  // the core that each thread is to move to, counted from 1; 0 for none
    std::mutex failing;
    std::exception_ptr failure;  // the first of this round

    // No exception may leave a thread. Those of the others waiting at the barrier follow from the first, which counts.
    void run_body(int id) {
        int64_t before = times_lost();
        if (int core = wanted[id].exchange(0)) move_to(core - 1);
        try {
            body(context, id);
            room.lost[id] += times_lost() - before;
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
            if (running.fetch_sub(1) == 1) running.notify_one();
        }
    }
    // Starts threads until there are `count` with the caller, or the system gives no more; returns how many there are.
    int recruit(int count) {
        if ((int)threads.size() >= count - 1) return count;
        // signals are handled on the interpreter's threads; these block all but their own faults
        sigset_t blocked, before;
        sigfillset(&blocked);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, fault);
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
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
    void make_room(int64_t count, double took) {
        static const bool all_threads = getenv("FORETELL_ALL_THREADS");
        Room::Move move = room.add(count, took, cores, all_threads);
        if (move.core >= 0) wanted[move.thread] = move.core + 1;
    }
};

static Team* team = new Team;  // never destroyed: its threads may outlive static destructors
std::mutex one_call;           // see threads.h

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
    threads = std::min<int64_t>({threads, room(), kMaxThreads - 1});
    return threads <= 1 ? 1 : team->recruit((int)threads);
}

void parallel(int64_t threads, void (*body)(void*, int64_t), void* context) {
    auto began = std::chrono::steady_clock::now();
    if (threads == 1)
        body(context, 0);
    else
        team->run((int)threads, body, context);
    team->make_room(threads, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
}

int64_t room() { return team->room.most; }

void* scratch(int64_t thread, Purpose purpose, int64_t bytes) {
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

}  // namespace foretell
