// Repeats recorded calls of the kernels on the memory they had, and writes what they leave of it (tools/arm_check.py).
//
//     repeat               prints the builds that this processor can run
//     repeat BUILD < calls > memories
//
// A call is a line, "name pointers bytes", then where in its memory its pointers lie, then this memory. It begins with
// the arguments, eight bytes each; a pointer is written as a place in it.
#include <cstdlib>
#include <iostream>
#include <utility>

#include "native.cpp"

template <class T>
static T word(const char* at) {
    T out;
    memcpy(&out, at, sizeof out);  // little-endian
    return out;
}

template <class... T, size_t... I>
static int apply(int (*function)(const Kernels*, T...), const Kernels* build, const char* arguments,
                 std::index_sequence<I...>) {
    return function(build, word<T>(arguments + 8 * I)...);
}

template <class... T>
static int apply(int (*function)(const Kernels*, T...), const Kernels* build, const char* arguments) {
    return apply(function, build, arguments, std::index_sequence_for<T...>{});
}

static int repeat(const std::string& name, const Kernels* build, const char* arguments) {
#define REPEAT(function) \
    if (name == #function) return apply(foretell_##function, build, arguments)
    REPEAT(sizes);
    REPEAT(pack);
    REPEAT(rows);
    REPEAT(layers);
    REPEAT(norm);
    REPEAT(linear);
    REPEAT(heads);
    REPEAT(attention);
    snprintf(message, sizeof message, "no such call");
    return 2;
}

int main(int count, char** arguments) {
    if (count == 1) {
        for (const Kernels* build : builds())
            if (build) std::cout << build->name << "\n";
        return 0;
    }
    const Kernels* build = find(arguments[1]);
    std::string name;
    size_t pointers, bytes;
    while (std::cin >> name >> pointers >> bytes) {
        std::vector<uint64_t> places(pointers);
        std::cin.get();
        std::cin.read((char*)places.data(), 8 * pointers);
        char* memory = (char*)aligned_alloc(64, (bytes + 63) / 64 * 64);
        std::cin.read(memory, bytes);
        auto move = [&](uint64_t by) {
            for (uint64_t place : places) {
                uint64_t pointer = word<uint64_t>(memory + place) + by;
                memcpy(memory + place, &pointer, 8);
            }
        };
        move((uint64_t)memory);
        if (repeat(name, build, memory)) {
            std::cerr << name << ": " << message << "\n";
            return 1;
        }
        move(-(uint64_t)memory);
        std::cout.write(memory, bytes);
        free(memory);
    }
}
