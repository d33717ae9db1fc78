// Plays calls of a team to its `Room`, and writes what follows from each (tests/test_room.py).
//
// A line of input is a call: threads, seconds, the core that is idle (-1 for none, -2 if nobody knows), and how often each
// thread lost its core. A line of output is how many threads there is room for, and which thread is to move where.
#include <iostream>

#include "room.h"

struct Told {
    int core;
    void look() {}
    int idle() const { return core; }
};

int main() {
    foretell::Room room;
    Told cores;
    int64_t count;
    double seconds;
    while (std::cin >> count >> seconds >> cores.core) {
        for (int64_t thread = 0; thread < count; thread++) {
            int64_t times;
            std::cin >> times;
            room.lost[thread] += times;
        }
        foretell::Room::Move move = room.add(count, seconds, cores, false);
        std::cout << room.most << " " << move.thread << " " << move.core << "\n";
    }
}
