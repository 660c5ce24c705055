// `mma.sync.aligned.m16n8k16.row.col.f32`, as the PTX manual has it: the section on matrix fragments for mma.m16n8k16 with
// floating point type says which element is where. Products are exact and their sum is rounded towards zero, once; real tensor
// cores drop bits of small terms, too, which is why no bits are compared with theirs.

#include "fragments.hpp"

#include <cmath>

namespace emulator {

namespace {

constexpr u32 ROWS = 16, COLUMNS = 8, DEPTH = 16;

double element(Format format, u32 pair, u32 index) {
    const u16 bits = static_cast<u16>(pair >> (16 * index));
    return format == Format::Half ? half_to_float(bits) : bits_to_float(static_cast<u32>(bits) << 16);
}

float towards_zero(double value) {
    const float nearest = static_cast<float>(value);
    if (!(std::fabs(static_cast<double>(nearest)) > std::fabs(value))) return nearest;
    return bits_to_float(float_to_bits(nearest) - 1);
}

}  // namespace

void multiply(Format format, Fragments* lanes) {
    double a[ROWS][DEPTH], b[DEPTH][COLUMNS], sum[ROWS][COLUMNS];
    for (u32 lane = 0; lane < WARP; lane++) {
        const u32 group = lane >> 2, in_group = lane % 4;
        for (u32 i = 0; i < 8; i++) {
            const u32 row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const u32 column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
            a[row][column] = element(format, lanes[lane].a[i / 2], i % 2);
        }
        for (u32 i = 0; i < 4; i++) {
            const u32 row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
            b[row][group] = element(format, lanes[lane].b[i / 2], i % 2);
        }
        for (u32 i = 0; i < 4; i++) {
            sum[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = lanes[lane].sum[i];
        }
    }
    for (u32 row = 0; row < ROWS; row++) {
        for (u32 k = 0; k < DEPTH; k++) {
            for (u32 column = 0; column < COLUMNS; column++) sum[row][column] += a[row][k] * b[k][column];
        }
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        const u32 group = lane >> 2, in_group = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            lanes[lane].result[i] = towards_zero(sum[i < 2 ? group : group + 8][in_group * 2 + (i & 1)]);
        }
    }
}

}  // namespace emulator
