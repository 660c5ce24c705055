// Products with up to 8 or 16 tokens a block, as when turns decode: what counts is reading weights once, with many reads under
// way. A block has 16 rows; its warps take a slab each in turn, bring it to their stages while others compute, and decode it
// straight into fragments.
#include "matmul.cuh"

template <typename Type, u32 TILES>
DEVICE void matmul_few(const MatmulArgs& args) {
    constexpr u32 ROWS = 16, TOKENS = 8 * TILES;
    // Sums of a token lie 20 apart, so that a warp stores those of a fragment in different banks.
    constexpr u32 STRIDE = 20;
    constexpr u32 OWN = (ROWS * TOKENS + BLOCK_THREADS - 1) / BLOCK_THREADS;
    __shared__ float sums[WARPS][TOKENS * STRIDE];
    __shared__ __align__(16) u8 stages[WARPS][StageBytes<Type, ROWS>::VALUE];
    const u32 warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const u32 first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const u32 runs = runs_of(args), slabs = (runs + SLAB_RUNS - 1) / SLAB_RUNS;
    float total[OWN];
#pragma unroll
    for (u32 i = 0; i < OWN; i++) total[i] = 0.0f;
    if constexpr (!Type::IS_FLOAT) {
        if (warp < slabs) Stage<Type, ROWS>{args, stages[warp], first_row}.fetch(warp);
    }
    for (u32 pass = 0; pass < slabs; pass += WARPS) {
        const u32 slab = pass + warp;
        float sum[TILES][4];
#pragma unroll
        for (u32 i = 0; i < TILES * 4; i++) sum[i / 4][i % 4] = 0.0f;
        if (slab < slabs) {
            if constexpr (!Type::IS_FLOAT) {
                finish_copies();
                __syncwarp();
            }
            const u32 slab_runs = smaller(SLAB_RUNS, runs - slab * SLAB_RUNS);
            // Four runs at a time, so that the reads of all four are under way.
            constexpr u32 AHEAD = 4;
            for (u32 first = 0; first < slab_runs; first += AHEAD) {
                uint4 low[AHEAD], high[AHEAD];
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) {
                    low[i] = high[i] = uint4{0, 0, 0, 0};
                    if (first + i >= slab_runs) continue;
                    if constexpr (Type::IS_FLOAT) {
                        const u32 k = (slab * SLAB_RUNS + first + i) * RUN + member * 8;
                        const u32 row = first_row + group;
                        if (k < args.cols && row < args.rows) {
                            low[i] = *reinterpret_cast<const uint4*>(args.weights + row * args.row_bytes + 2 * k);
                        }
                        if (k < args.cols && row + 8 < args.rows) {
                            high[i] = *reinterpret_cast<const uint4*>(args.weights + (row + 8) * args.row_bytes + 2 * k);
                        }
                    } else {
                        const Stage<Type, ROWS> stage{args, stages[warp], first_row};
                        low[i] = stage.octet(group, slab, first + i, member);
                        high[i] = stage.octet(group + 8, slab, first + i, member);
                    }
                }
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) {
                    if (first + i >= slab_runs) continue;
                    const u32 run = slab * SLAB_RUNS + first + i;
#pragma unroll
                    for (u32 tile = 0; tile < TILES; tile++) {
                        const u32 token = first_token + tile * 8 + group;
                        uint4 x[PARTS<Type>];
#pragma unroll
                        for (u32 part = 0; part < PARTS<Type>; part++) {
                            const u64 row = (static_cast<u64>(run) * PARTS<Type> + part) * args.tokens + token;
                            x[part] = token < args.tokens ? args.x[row * 4 + member] : uint4{0, 0, 0, 0};
                        }
                        multiply_run<Type>(sum[tile], low[i], high[i], x);
                    }
                }
            }
            if constexpr (!Type::IS_FLOAT) {
                __syncwarp();
                if (slab + WARPS < slabs) Stage<Type, ROWS>{args, stages[warp], first_row}.fetch(slab + WARPS);
            }
        }
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 token = tile * 8 + member * 2 + i % 2, row = group + i / 2 * 8;
                sums[warp][token * STRIDE + row] = sum[tile][i];
            }
        }
        __syncthreads();
        const u32 there = smaller(WARPS, slabs - pass);
#pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            const u32 own = threadIdx.x + i * BLOCK_THREADS;
            if (own >= ROWS * TOKENS) break;
            for (u32 slab = 0; slab < there; slab++) total[i] = total[i] + sums[slab][own / ROWS * STRIDE + own % ROWS];
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        const u32 own = threadIdx.x + i * BLOCK_THREADS;
        const u32 token = first_token + own / ROWS, row = first_row + own % ROWS;
        if (own < ROWS * TOKENS && token < args.tokens && row < args.rows) {
            args.out[static_cast<u64>(token) * args.rows + row] = total[i] * factor_of<Type>(args, token);
        }
    }
}

#define PRODUCTS(Type) \
    KERNEL(matmul_eight_##Type, MatmulArgs) { matmul_few<Type, 1>(args); } \
    KERNEL(matmul_sixteen_##Type, MatmulArgs) { matmul_few<Type, 2>(args); }

EACH_TENSOR_TYPE(PRODUCTS)
