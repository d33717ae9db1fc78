// The lock that every exported call takes first: threads, barrier and scratch memory belong to one call at a time.
// Not in common.h: what <mutex> makes inline must not be compiled for one instruction set and linked for all.
#pragma once
#include <mutex>

namespace foretell {
extern std::mutex one_call;
}
