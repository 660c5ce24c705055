// What tensor cores do with the fragments of a warp.
#pragma once

#include "../common.cuh"

namespace emulator {

// What a lane holds: a and b as pairs of 16-bit floats, the first in the lower half, and what it gets.
struct Fragments {
    u32 a[4];
    u32 b[2];
    float sum[4];
    float result[4];
};

// Of all 32 lanes: result = sum + a b.
void multiply(Format format, Fragments* lanes);

}  // namespace emulator
