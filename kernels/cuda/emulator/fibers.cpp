// Runs a kernel's blocks: every thread of a block is a fiber with a stack of its own, which runs until it waits for others.
// Warps run as far ahead of each other as barriers let them, in odd blocks the last one first: a missing barrier shows.

#include "fragments.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

__thread Index thread_index, block_index;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr u32 MOST_THREADS = 1024;

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

// Sixteen bytes on their way to shared memory.
struct Copy {
    void* to;
    const void* from;
    u32 bytes;
};

// What the lanes of a warp do together.
enum class Meeting { Barrier, Exchange, MultiplyHalves, MultiplyBrains };

struct Warp {
    Meeting meeting;
    u32 arrived = 0;
    // Of each lane: what it brings, and what it takes.
    float given[WARP], taken[WARP];
    u32 from[WARP];
    Fragments fragments[WARP];
};

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t first;
    jmp_buf place;
    bool begun = false;
    State state = State::Done;
    std::vector<Copy> copies;
};

// What a thread of the operating system has to run blocks with.
struct Runner {
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
    u32 current = 0;
    Body body = nullptr;
    const void* arguments = nullptr;
    std::vector<float> shared;
    Warp warps[MOST_THREADS / WARP];
};

thread_local Runner own_runner;
// The same, without asking whether it was made: it is used at every step of every thread.
__thread Runner* runner;

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "emulated CUDA device: %s (block %u %u %u)\n", what, block_index.x, block_index.y, block_index.z);
    abort();
}

void leave(State state) {
    Fiber& fiber = runner->fibers[runner->current];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(runner->scheduler, 1);
}

void fiber_main() {
    for (;;) {
        runner->body(runner->arguments);
        runner->fibers[runner->current].copies.clear();
        leave(State::Done);
    }
}

// Until the thread waits or is done.
void resume(u32 index) {
    Runner& own = *runner;
    Fiber& fiber = own.fibers[index];
    own.current = index;
    thread_index = {index, 0, 0};
    if (_setjmp(own.scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = STACK_BYTES;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, fiber_main, 0);
    setcontext(&fiber.first);
}

// Lets those go on that everybody waits for. False: all are done.
bool release(u32 threads) {
    std::vector<Fiber>& fibers = runner->fibers;
    u32 waiting = 0, done = 0;
    for (u32 i = 0; i < threads; i++) {
        waiting += fibers[i].state == State::AtBlockBarrier;
        done += fibers[i].state == State::Done;
    }
    if (done == threads) return false;
    if (waiting < threads) fail("threads wait for others that are done or wait elsewhere");
    for (u32 i = 0; i < threads; i++) fibers[i].state = State::Ready;
    return true;
}

Warp& own_warp() { return runner->warps[runner->current / WARP]; }

// True for the lane that comes last, which does what there is to do with what all brought and then lets the others go.
bool meet(Meeting meeting) {
    Warp& warp = own_warp();
    if (warp.arrived > 0 && warp.meeting != meeting) fail("lanes of a warp meet in different instructions");
    warp.meeting = meeting;
    warp.arrived++;
    if (warp.arrived == WARP) return true;
    leave(State::AtWarpBarrier);
    return false;
}

void let_go() {
    const u32 first = runner->current / WARP * WARP;
    own_warp().arrived = 0;
    for (u32 i = first; i < first + WARP; i++) runner->fibers[i].state = State::Ready;
}

std::map<std::string, const Kernel*>& kernels() {
    static std::map<std::string, const Kernel*> all;
    return all;
}

}  // namespace

Kernel::Kernel(const char* name, size_t argument_bytes, Body body)
    : name(name), argument_bytes(argument_bytes), body(body) {
    kernels()[name] = this;
}

const Kernel* find_kernel(const char* name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : found->second;
}

void synchronise_block() { leave(State::AtBlockBarrier); }

void synchronise_warp() {
    if (meet(Meeting::Barrier)) let_go();
}

float exchange_in_warp(float value, int lanes) {
    Warp& warp = own_warp();
    const u32 lane = runner->current % WARP;
    warp.given[lane] = value;
    warp.from[lane] = lane ^ static_cast<u32>(lanes);
    if (meet(Meeting::Exchange)) {
        for (u32 i = 0; i < WARP; i++) warp.taken[i] = warp.given[warp.from[i]];
        let_go();
    }
    return warp.taken[lane];
}

void multiply_in_warp(Format format, float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Fragments& own = own_warp().fragments[runner->current % WARP];
    own = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}, {}};
    if (meet(format == Format::Half ? Meeting::MultiplyHalves : Meeting::MultiplyBrains)) {
        multiply(format, own_warp().fragments);
        let_go();
    }
    memcpy(sum, own.result, sizeof own.result);
}

// Until the thread waits for its copies, what is to be overwritten is neither what was there nor what will be.
void copy_later(void* to, const void* from, u32 bytes) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    if (!is_aligned || bytes > 16) fail("an asynchronous copy to or from an address that is no multiple of 16");
    memset(to, 0xff, 16);
    runner->fibers[runner->current].copies.push_back({to, from, bytes});
}

void finish_copies() {
    for (const Copy& copy : runner->fibers[runner->current].copies) {
        memset(copy.to, 0, 16);
        memcpy(copy.to, copy.from, copy.bytes);
    }
    runner->fibers[runner->current].copies.clear();
}

float* dynamic_shared() { return runner->shared.data(); }

void run(const Kernel& kernel, const void* arguments, Index blocks, u32 threads, size_t shared_bytes) {
    Runner& own = own_runner;
    runner = &own;
    if (threads == 0 || threads > MOST_THREADS || threads % WARP != 0) fail("a block of whole warps was expected");
    while (own.fibers.size() < threads) own.fibers.emplace_back();
    own.body = kernel.body;
    own.arguments = arguments;
    const float nothing = bits_to_float(0xffffffffu);
    for (u32 z = 0; z < blocks.z; z++) {
        for (u32 y = 0; y < blocks.y; y++) {
            for (u32 x = 0; x < blocks.x; x++) {
                block_index = {x, y, z};
                own.shared.assign(shared_bytes / sizeof(float) + 1, nothing);
                for (u32 i = 0; i < threads; i++) own.fibers[i].state = State::Ready;
                for (u32 i = 0; i < threads / WARP; i++) own.warps[i].arrived = 0;
                const bool backwards = (x + y + z) % 2 == 1;
                do {
                    // A warp goes on as long as it can before another does.
                    for (u32 i = 0; i < threads; i += WARP) {
                        for (bool goes_on = true; goes_on;) {
                            goes_on = false;
                            for (u32 lane = i; lane < i + WARP; lane++) {
                                const u32 next = backwards ? threads - 1 - lane : lane;
                                if (own.fibers[next].state != State::Ready) continue;
                                resume(next);
                                goes_on = true;
                            }
                        }
                    }
                } while (release(threads));
            }
        }
    }
}

}  // namespace emulator
