// The instructions of tensor cores, and of copies to shared memory that go on by themselves, as functions. Their twins on the
// emulated device are in emulator/device.hpp.
#pragma once
#include "common.cuh"

#ifndef DORMOUSE_EMULATED

// A warp's sum[16][8] += a[16][16] b[16][8]: products of f16, added up in f32. Each thread has a fragment of the three, of a
// and b two values to a word. All threads of the warp come here together.
DEVICE void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with bf16.
DEVICE void multiply_brains(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy `bytes`, at most 16, and after them zeros up to 16. Both places are multiples of 16.
DEVICE void copy_16(void* shared, const void* from, u32 bytes) {
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits for all that the calling thread began to copy. Other threads see it after the next barrier.
DEVICE void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two f16, the first in the lower half.
DEVICE u32 pack_halves(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return static_cast<u32>(__half_as_ushort(__low2half(both))) | static_cast<u32>(__half_as_ushort(__high2half(both))) << 16;
}

#endif
