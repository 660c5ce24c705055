// out[token, row] = sum over k of x[token, k] * weights[row, k], on tensor cores.
//
// One order of additions, which K alone fixes: slabs of 256 consecutive k are each summed by one chain of `mma` instructions
// with k ascending, and the slabs' sums are added in order, in f32. The kernels for few tokens (matmul_few.cu) and for many
// (matmul_many.cu) both keep it, and an element's chain knows nothing of its neighbours: a row's bits are the same whether it
// comes alone or with five hundred others.
//
// A thread's fragments hold two k of each half of a step of sixteen. Which k these are is ours to say, as long as weights and
// activations agree: of a run of 32 k, the threads of a group of four take eight consecutive k each, four for the first step
// and four for the second. So a thread has its fragments of two steps in one octet, which is one load of 16 bytes.
#pragma once
#include "quant.cuh"
#include "tensor.cuh"

static constexpr u32 SLAB = 256;
static constexpr u32 SLAB_RUNS = SLAB / RUN;
static constexpr u32 WARPS = BLOCK_THREADS / WARP;

// Into how many 16-bit floats an activation is split, each of them a product with the weight: two parts of f16 keep 22 bits of
// an activation and two of bf16 keep 16, beside weights that are exact. Beside quantised weights, which are rounded to f16
// when they are decoded, one part of f16 loses no more than they do. `ACTIVATIONS` in kernels/src/cuda/products.rs agrees.
template <typename Type>
static constexpr u32 PARTS = Type::IS_FLOAT ? 2 : 1;

// Decoded weights are multiplied by this before they are rounded to f16: it has eleven bits for magnitudes from 2^-14 on, and
// that is 2^-20 (0.00000095) for weights then, while those of up to 1023 stay finite.
static constexpr float WEIGHT_FACTOR = 64.0f;

struct MatmulArgs {
    const u8* weights;
    // [runs, parts, tokens, 32]: what `round_activations` makes, as octets.
    const uint4* x;
    // Of each token.
    const float* factors;
    // [tokens, rows]
    float* out;
    u64 row_bytes;
    u32 rows;
    // A multiple of 8, and of 32 for quantised types.
    u32 cols;
    u32 tokens;
};

DEVICE u32 runs_of(const MatmulArgs& args) { return (args.cols + RUN - 1) / RUN; }

// What a token's sums are multiplied with in the end, a power of two.
template <typename Type>
DEVICE float factor_of(const MatmulArgs& args, u32 token) {
    return Type::IS_FLOAT ? args.factors[token] : args.factors[token] * (1.0f / WEIGHT_FACTOR);
}

// Of a run, the products of 16 rows with 8 tokens: `low` and `high` are this thread's octets of two rows that are eight apart.
template <typename Type>
DEVICE void multiply_run(float (&sum)[4], const uint4& low, const uint4& high, const uint4 (&x)[PARTS<Type>]) {
    const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (u32 part = 0; part < PARTS<Type>; part++) {
        if constexpr (Type::IS_BRAIN) {
            multiply_brains(sum, first, x[part].x, x[part].y);
        } else {
            multiply_halves(sum, first, x[part].x, x[part].y);
        }
    }
#pragma unroll
    for (u32 part = 0; part < PARTS<Type>; part++) {
        if constexpr (Type::IS_BRAIN) {
            multiply_brains(sum, second, x[part].z, x[part].w);
        } else {
            multiply_halves(sum, second, x[part].z, x[part].w);
        }
    }
}

// Quantised weights come from a stage: a warp's own shared memory, into which it copies the bytes of a slab of `ROWS` rows as
// they are, in pieces of 16 bytes, whatever the blocks' alignment. Rows there begin where they begin within such a piece.
template <typename Type, u32 ROWS>
struct Stage {
    static constexpr u32 SLAB_BYTES = SLAB / Type::VALUES * Type::BYTES;
    static constexpr u32 LOWEST_BIT = Type::BYTES & (~Type::BYTES + 1), ALIGNMENT = LOWEST_BIT < 16 ? LOWEST_BIT : 16;
    static constexpr u32 PIECES = (SLAB_BYTES + (16 - ALIGNMENT) + 15) / 16;
    // An odd number of pieces, so that the same place of eight rows lies in different banks.
    static constexpr u32 STRIDE = (PIECES | 1) * 16;
    static constexpr u32 BYTES = ROWS * STRIDE;

    const MatmulArgs& args;
    u8* memory;
    u32 first_row;

    // Begins to copy; rows that there are not stay what they were. No lane may still be decoding.
    DEVICE void fetch(u32 slab) const {
        const u64 all_bytes = args.rows * args.row_bytes;
        const u64 slab_begin = static_cast<u64>(slab) * SLAB_BYTES;
        const u64 rest = args.row_bytes - slab_begin, slab_bytes = rest < SLAB_BYTES ? rest : SLAB_BYTES;
        for (u32 i = threadIdx.x % WARP; i < ROWS * PIECES; i += WARP) {
            const u32 row = i / PIECES, piece = i % PIECES;
            const u64 begin = (first_row + row) * args.row_bytes + slab_begin;
            const u64 at = begin / 16 * 16 + piece * 16;
            if (first_row + row < args.rows && at < begin + slab_bytes) {
                const u32 there = static_cast<u32>(all_bytes - at < 16 ? all_bytes - at : 16);
                copy_16(memory + row * STRIDE + piece * 16, args.weights + at, there);
            }
        }
    }

    // Octet `o` of a run of the slab, as f16.
    DEVICE uint4 octet(u32 row, u32 slab, u32 run, u32 o) const {
        const u64 begin = (first_row + row) * args.row_bytes + static_cast<u64>(slab) * SLAB_BYTES;
        const u8* bytes = memory + row * STRIDE + static_cast<u32>(begin % 16);
        float w[8];
        Type(bytes, run).octet(o, w);
        u32 halves[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) halves[i] = pack_halves(w[2 * i] * WEIGHT_FACTOR, w[2 * i + 1] * WEIGHT_FACTOR);
        return uint4{halves[0], halves[1], halves[2], halves[3]};
    }
};

// Bytes of the stage for `ROWS` rows. Floats need none, but arrays have a size.
template <typename Type, u32 ROWS, bool = Type::IS_FLOAT>
struct StageBytes {
    static constexpr u32 VALUE = Stage<Type, ROWS>::BYTES;
};

template <typename Type, u32 ROWS>
struct StageBytes<Type, ROWS, true> {
    static constexpr u32 VALUE = 16;
};
