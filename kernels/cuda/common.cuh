// What every kernel file begins with. Compiled by nvcc for devices, and by a C++ compiler for the emulated one
// (emulator/device.hpp), which stands in for what is written here between #else and #endif.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Threads of every block, unless a kernel says otherwise.
static constexpr int BLOCK_THREADS = 256;
static constexpr int WARP = 32;

#ifdef DORMOUSE_EMULATED
#include "emulator/device.hpp"
#else
#include <cuda_fp16.h>

// A kernel takes one argument, a struct that the host fills in with the same layout.
#define KERNEL(name, Args) extern "C" __global__ void __launch_bounds__(256, 1) name(const __grid_constant__ Args args)
#define DEVICE __device__ __forceinline__
// Shared memory whose size the launch says; it begins at a multiple of 16 bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]

DEVICE float half_to_float(u16 bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE u16 float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }
#endif

// The same tree of additions in every lane.
DEVICE float warp_sum(float value) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value = value + shuffle_xor(value, lanes);
    return value;
}

DEVICE float warp_max(float value) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
    return value;
}

DEVICE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }
