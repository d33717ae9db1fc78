// How many threads the machine has room for, and where.
//
// Where another process runs, one of the team has no core to itself: the others wait for it at every barrier, and all are
// slower than one thread less would be. So threads that keep losing their cores are fewer from then on, and one more is tried
// when a core is idle: first after a second, then after twice as long each time. But some systems gather threads on one core
// while another is idle: then one of them moves there.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#include "common.h"

namespace foretell {

constexpr int kNone = -1, kUnknown = -2;

// Which cores are idle, as far as the system tells.
class Cores {
    struct Times {
        double idle = 0, all = -1;  // -1: a core that this process may not use, or one that is off
    };
    std::vector<Times> before;

    static std::vector<Times> times() {
        std::vector<Times> cores;
#ifdef __linux__
        cpu_set_t ours;
        FILE* stat = sched_getaffinity(0, sizeof ours, &ours) ? nullptr : fopen("/proc/stat", "re");
        char line[256];
        while (stat && fgets(line, sizeof line, stat) && !strncmp(line, "cpu", 3)) {
            int core;
            double t[8];  // user, nice, system, idle, waiting for a disk, interrupts (2), stolen
            if (line[3] == ' ' || sscanf(line, "cpu%d %lf %lf %lf %lf %lf %lf %lf %lf", &core, t, t + 1, t + 2, t + 3, t + 4,
                                         t + 5, t + 6, t + 7) != 9)
                continue;
            cores.resize(std::max((int)cores.size(), core + 1));
            if (core >= CPU_SETSIZE || !CPU_ISSET(core, &ours)) continue;
            cores[core] = {t[3] + t[4], t[0] + t[1] + t[2] + t[3] + t[4] + t[5] + t[6] + t[7]};
        }
        if (stat) fclose(stat);
#endif
        return cores;
    }

  public:
    void look() { before = times(); }
    // The core that has been idle longest since `look`, and most of the time.
    int idle() const {
        std::vector<Times> now = times();
        double most = 0.5;
        int found = kUnknown;
        for (size_t core = 0; core < std::min(now.size(), before.size()); core++) {
            double passed = now[core].all - before[core].all, idle = now[core].idle - before[core].idle;
            if (before[core].all < 0 || now[core].all < 0 || passed <= 0) continue;
            if (found == kUnknown) found = kNone;
            if (idle > most * passed) most = idle / passed, found = (int)core;
        }
        return found;
    }
};

// Moves the calling thread to a core, without binding it there.
static inline void move_to([[maybe_unused]] int core) {
#ifdef __linux__
    cpu_set_t before, one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    if (sched_getaffinity(0, sizeof before, &before) || sched_setaffinity(0, sizeof one, &one)) return;
    sched_setaffinity(0, sizeof before, &before);
#endif
}

struct Room {
    static constexpr double kWindow = 0.02, kOften = 100, kFirst = 0.5, kLongest = 64;  // seconds; times a second; seconds
    static constexpr int kWindows = 4, kMoves = 2;  // crowded ones in a row; moves before threads become fewer

    struct Move {
        int64_t thread = 0;
        int core = kNone;
    };

    std::atomic<int64_t> most{kMaxThreads};
    std::atomic<int64_t> lost[kMaxThreads]{};  // times that each thread lost its core in this window
    double seconds = 0, kept = 0, waited = 0, pause = kFirst;
    int crowded = 0, moved = 0;
    bool raised = false;  // the present number was tried when a core was idle

    // Counts a call that took so many seconds of `count` threads; returns who should move, if anybody.
    template <class Cores>
    Move add(int64_t count, double took, Cores& cores, bool all_threads) {
        seconds += took;
        if (count > most || seconds < kWindow) return {};
        int64_t worst = std::max_element(lost, lost + count) - lost;
        bool often = count > 1 && (double)lost[worst] > kOften * seconds;
        for (int64_t i = 0; i < count; i++) lost[i] = 0;
        kept += std::exchange(seconds, 0.0);
        crowded = often ? crowded + 1 : 0;
        if (crowded == 1) cores.look();
        if (crowded == kWindows) {
            crowded = 0;
            int core = cores.idle();
            if (core >= 0 && moved < kMoves) return moved++, Move{worst, core};
            if (all_threads) return {};
            most = count - 1, pause = std::min(2 * pause, kLongest), kept = waited = 0, moved = 0, raised = false;
            cores.look();
        } else if (kept > pause) {
            moved = 0;
            if (raised || count < most) pause = kFirst;
            if (count == most) {
                waited += std::exchange(kept, 0.0);
                raised = cores.idle() != kNone || waited > kLongest;
                if (raised) most = most + 1, waited = 0;
                cores.look();
            }
        }
        return {};
    }
};

}  // namespace foretell
