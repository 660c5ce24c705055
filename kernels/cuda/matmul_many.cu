// Products with many tokens, as when prompts are read: a block has tiles of rows and of tokens, and every weight is decoded
// once for all of its tokens. While tensor cores multiply a run of 32 k, the next one is brought.
#include "matmul.cuh"

// Two warps share the rows, four the tokens.
template <typename Type, u32 ROWS, u32 TOKENS>
DEVICE void matmul_many(const MatmulArgs& args) {
    // Fragments of a warp, and octets of a tile. In a tile, rows of a run follow one another: eight lanes that load at once
    // then find theirs in 128 consecutive bytes.
    constexpr u32 M = ROWS / 2 / 16, N = TOKENS / 4 / 8;
    constexpr u32 W_TILE = ROWS * 4, X_TILE = PARTS<Type> * TOKENS * 4;
    constexpr u32 WARP_ROWS = ROWS / WARPS;
    DYNAMIC_SHARED(shared);
    uint4* const w_tiles = reinterpret_cast<uint4*>(shared);
    uint4* const x_tiles = w_tiles + 2 * W_TILE;
    u8* const stages = reinterpret_cast<u8*>(x_tiles + 2 * X_TILE);
    const u32 own = threadIdx.x, warp = own / WARP, lane = own % WARP, group = lane / 4, member = lane % 4;
    // Tokens first: blocks that run together then read the same weights.
    const u32 first_token = blockIdx.x * TOKENS, first_row = blockIdx.y * ROWS;
    const u32 runs = runs_of(args);

    // Begins to copy activations, and weights that need no decoding.
    const auto bring = [&](u32 run) {
        uint4* const x = x_tiles + run % 2 * X_TILE;
        for (u32 i = own; i < X_TILE; i += BLOCK_THREADS) {
            const u32 part = i / (TOKENS * 4), token = first_token + i / 4 % TOKENS;
            const u64 row = (static_cast<u64>(run) * PARTS<Type> + part) * args.tokens + token;
            const bool there = token < args.tokens;
            copy_16(x + i, there ? args.x + row * 4 + i % 4 : args.x, there ? 16 : 0);
        }
        if constexpr (Type::IS_FLOAT) {
            uint4* const w = w_tiles + run % 2 * W_TILE;
            for (u32 i = own; i < W_TILE; i += BLOCK_THREADS) {
                const u32 row = first_row + i / 4, k = run * RUN + i % 4 * 8;
                const bool there = row < args.rows && k < args.cols;
                copy_16(w + i, there ? args.weights + row * args.row_bytes + 2 * k : args.weights, there ? 16 : 0);
            }
        }
    };
    // Begins to copy the slab that begins with this run, if one does.
    const auto fetch = [&](u32 run) {
        if constexpr (!Type::IS_FLOAT) {
            if (run < runs && run % SLAB_RUNS == 0) {
                // All lanes have decoded what was there before.
                __syncwarp();
                const Stage<Type, WARP_ROWS> stage{args, stages + warp * Stage<Type, WARP_ROWS>::BYTES,
                                                   first_row + warp * WARP_ROWS};
                stage.fetch(run / SLAB_RUNS);
            }
        }
    };
    // Each warp decodes its own rows.
    const auto decode = [&](u32 run) {
        if constexpr (!Type::IS_FLOAT) {
            const Stage<Type, WARP_ROWS> stage{args, stages + warp * Stage<Type, WARP_ROWS>::BYTES,
                                               first_row + warp * WARP_ROWS};
            uint4* const w = w_tiles + run % 2 * W_TILE + warp * WARP_ROWS * 4;
#pragma unroll
            for (u32 i = lane; i < WARP_ROWS * 4; i += WARP) {
                w[i] = stage.octet(i / 4, run / SLAB_RUNS, run % SLAB_RUNS, i % 4);
            }
        }
    };

    float total[M][N][4], sum[M][N][4];
#pragma unroll
    for (u32 i = 0; i < M * N * 4; i++) total[i / 4 / N][i / 4 % N][i % 4] = sum[i / 4 / N][i / 4 % N][i % 4] = 0.0f;
    bring(0);
    fetch(0);
    finish_copies();
    __syncwarp();
    decode(0);
    for (u32 run = 0; run < runs; run++) {
        // This run's tiles, and if need be the next one's slab, are there; nobody reads the tiles of the run before.
        finish_copies();
        __syncthreads();
        if (run + 1 < runs) {
            bring(run + 1);
            decode(run + 1);
            fetch(run + 2);
        }
        const uint4* const w = w_tiles + run % 2 * W_TILE + warp % 2 * (ROWS / 2) * 4;
        const uint4* const x = x_tiles + run % 2 * X_TILE + warp / 2 * (TOKENS / 4) * 4;
        uint4 low[M], high[M];
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            low[m] = w[(m * 16 + group) * 4 + member];
            high[m] = w[(m * 16 + 8 + group) * 4 + member];
        }
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            uint4 own_x[PARTS<Type>];
#pragma unroll
            for (u32 part = 0; part < PARTS<Type>; part++) own_x[part] = x[(part * TOKENS + n * 8 + group) * 4 + member];
#pragma unroll
            for (u32 m = 0; m < M; m++) multiply_run<Type>(sum[m][n], low[m], high[m], own_x);
        }
        if ((run + 1) % SLAB_RUNS == 0 || run + 1 == runs) {
#pragma unroll
            for (u32 i = 0; i < M * N * 4; i++) {
                const u32 m = i / 4 / N, n = i / 4 % N;
                total[m][n][i % 4] = total[m][n][i % 4] + sum[m][n][i % 4];
                sum[m][n][i % 4] = 0.0f;
            }
        }
    }
#pragma unroll
    for (u32 n = 0; n < N; n++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 token = first_token + warp / 2 * (TOKENS / 4) + n * 8 + member * 2 + i;
            if (token >= args.tokens) continue;
            const float factor = factor_of<Type>(args, token);
            float* const out = args.out + static_cast<u64>(token) * args.rows;
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                const u32 row = first_row + warp % 2 * (ROWS / 2) + m * 16 + group;
                if (row < args.rows) out[row] = total[m][n][i] * factor;
                if (row + 8 < args.rows) out[row + 8] = total[m][n][i + 2] * factor;
            }
        }
    }
}

#define PRODUCTS(Type) \
    KERNEL(matmul_some_##Type, MatmulArgs) { matmul_many<Type, 64, 64>(args); } \
    KERNEL(matmul_many_##Type, MatmulArgs) { matmul_many<Type, 128, 128>(args); }

EACH_TENSOR_TYPE(PRODUCTS)
