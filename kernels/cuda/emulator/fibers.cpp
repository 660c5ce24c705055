// Runs a kernel's blocks: every thread of a block is a fiber with a stack of its own, which runs until it waits for others.
// Odd blocks run their threads backwards, so that a missing barrier shows as a result that depends on the block.

#include "../common.cuh"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

thread_local Index thread_index, block_index;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr u32 MOST_THREADS = 1024;

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t first;
    jmp_buf place;
    bool begun = false;
    State state = State::Done;
};

// What a thread of the operating system has to run blocks with.
struct Runner {
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
    u32 current = 0;
    Body body = nullptr;
    const void* arguments = nullptr;
    std::vector<float> shared;
    float exchanged[MOST_THREADS];
};

thread_local Runner runner;

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "emulated CUDA device: %s (block %u %u %u)\n", what, block_index.x, block_index.y, block_index.z);
    abort();
}

void leave(State state) {
    Fiber& fiber = runner.fibers[runner.current];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(runner.scheduler, 1);
}

void fiber_main() {
    for (;;) {
        runner.body(runner.arguments);
        leave(State::Done);
    }
}

// Until the thread waits or is done.
void resume(u32 index) {
    Runner& own = runner;
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
    std::vector<Fiber>& fibers = runner.fibers;
    u32 waiting = 0, done = 0;
    for (u32 i = 0; i < threads; i++) {
        waiting += fibers[i].state == State::AtBlockBarrier;
        done += fibers[i].state == State::Done;
    }
    if (done == threads) return false;
    if (waiting == threads) {
        for (u32 i = 0; i < threads; i++) fibers[i].state = State::Ready;
        return true;
    }
    bool released = false;
    for (u32 warp = 0; warp < threads; warp += WARP) {
        u32 lanes = 0;
        for (u32 i = warp; i < warp + WARP; i++) lanes += fibers[i].state == State::AtWarpBarrier;
        if (lanes < WARP) continue;
        for (u32 i = warp; i < warp + WARP; i++) fibers[i].state = State::Ready;
        released = true;
    }
    if (!released) fail("threads wait for others that are done or wait elsewhere");
    return true;
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

float exchange_in_warp(float value, int lanes) {
    const u32 own = thread_index.x;
    runner.exchanged[own] = value;
    leave(State::AtWarpBarrier);
    const float other = runner.exchanged[own ^ static_cast<u32>(lanes)];
    leave(State::AtWarpBarrier);
    return other;
}

float* dynamic_shared() { return runner.shared.data(); }

void run(const Kernel& kernel, const void* arguments, Index blocks, u32 threads, size_t shared_bytes) {
    Runner& own = runner;
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
                const bool backwards = (x + y + z) % 2 == 1;
                do {
                    for (u32 i = 0; i < threads; i++) {
                        const u32 next = backwards ? threads - 1 - i : i;
                        if (own.fibers[next].state == State::Ready) resume(next);
                    }
                } while (release(threads));
            }
        }
    }
}

}  // namespace emulator
