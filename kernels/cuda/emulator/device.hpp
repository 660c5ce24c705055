// CUDA's language as plain C++, for tests on machines without a device: what kernels in ../*.cu use of it and no more.
// A block's threads are fibers of one thread of the operating system (fibers.cpp).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

struct Index {
    u32 x, y, z;
};

extern __thread Index thread_index, block_index;

// Wait for the other threads of the block, of the warp.
void synchronise_block();
void synchronise_warp();
float exchange_in_warp(float value, int lanes);
float* dynamic_shared();

enum class Format { Half, Brain };
// `mma.sync.aligned.m16n8k16.row.col.f32`: what the calling lane holds of the three matrices.
void multiply_in_warp(Format format, float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1);
// `cp.async` of 16 bytes, and `cp.async.wait_all`.
void copy_later(void* to, const void* from, u32 bytes);
void finish_copies();

using Body = void (*)(const void* arguments);

struct Kernel {
    const char* name;
    size_t argument_bytes;
    Body body;
    Kernel(const char* name, size_t argument_bytes, Body body);
};

const Kernel* find_kernel(const char* name);
void run(const Kernel& kernel, const void* arguments, Index blocks, u32 threads, size_t shared_bytes);

}  // namespace emulator

#define KERNEL(name, Args)                                                                          \
    static void name(const Args& args);                                                             \
    static const emulator::Kernel registered_##name(                                                \
        #name, sizeof(Args), [](const void* args) { name(*static_cast<const Args*>(args)); });      \
    static void name(const Args& args)
#define DEVICE inline
#define DYNAMIC_SHARED(name) float* const name = emulator::dynamic_shared()
// One block at a time runs on a thread of the operating system.
#define __shared__ static thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define __syncthreads emulator::synchronise_block
#define __syncwarp emulator::synchronise_warp

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) uint4 {
    u32 x, y, z, w;
};

DEVICE u32 float_to_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
DEVICE float bits_to_float(u32 bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
DEVICE float half_to_float(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
}
DEVICE u16 float_to_half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    u16 bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
DEVICE float shuffle_xor(float value, int lanes) { return emulator::exchange_in_warp(value, lanes); }

// The twins of tensor.cuh.
DEVICE u32 pack_halves(float first, float second) {
    return float_to_half(first) | static_cast<u32>(float_to_half(second)) << 16;
}
DEVICE void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::multiply_in_warp(emulator::Format::Half, sum, a, b0, b1);
}
DEVICE void multiply_brains(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::multiply_in_warp(emulator::Format::Brain, sum, a, b0, b1);
}
DEVICE void copy_16(void* shared, const void* from, u32 bytes) { emulator::copy_later(shared, from, bytes); }
DEVICE void finish_copies() { emulator::finish_copies(); }
