// out[token, row] = sum over k of x[token, k] * weights[row, k], where weights are f32: without tensor cores, which have no
// such type. Few matrices are, and what they compute (which experts a row goes to) is worth exactness.
//
// One order of additions, which K alone fixes: slabs of 128 consecutive k are each summed by one chain of fused multiply-adds
// with k ascending, and the slabs' sums are added in order. Both kernels keep it, so a row's bits are the same whether it comes
// alone or with five hundred others.
#include "common.cuh"

struct FloatMatmulArgs {
    // [rows, cols]
    const float* weights;
    const float* x;
    float* out;
    u32 rows;
    // A multiple of 8.
    u32 cols;
    u32 tokens;
};

DEVICE void load_octet(const float* from, float* values) {
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    const float all[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (u32 i = 0; i < 8; i++) values[i] = all[i];
}

// Up to `TOKENS` tokens a block (block.y), as when turns decode: what counts is reading weights once. A thread sums a slab of a
// row; `SLABS` threads share a row, so that as many of a pass's activations as fit lie in shared memory.
template <u32 TOKENS, u32 SLABS>
DEVICE void matmul_f32_few(const FloatMatmulArgs& args) {
    constexpr u32 SLAB = 128;
    constexpr u32 ROWS = BLOCK_THREADS / SLABS;
    // Four more than a slab: threads that read the same place of neighbouring slabs then use different banks.
    constexpr u32 STRIDE = SLAB + 4;
    __shared__ __align__(16) float x[TOKENS][SLABS][STRIDE];
    __shared__ float sums[ROWS][TOKENS][SLABS];
    const u32 lane = threadIdx.x % SLABS, own_row = threadIdx.x / SLABS;
    const u32 row = blockIdx.x * ROWS + own_row, first_token = blockIdx.y * TOKENS;
    const u32 slabs = (args.cols + SLAB - 1) / SLAB;
    // The sum that this thread adds up and writes.
    const u32 total_row = threadIdx.x / TOKENS, total_token = threadIdx.x % TOKENS;
    float total = 0.0f;
    for (u32 pass = 0; pass < slabs; pass += SLABS) {
        for (u32 i = threadIdx.x; i < TOKENS * SLABS * SLAB; i += BLOCK_THREADS) {
            const u32 token = i / (SLABS * SLAB), at = i % (SLABS * SLAB), k = pass * SLAB + at;
            const bool there = first_token + token < args.tokens && k < args.cols;
            x[token][at / SLAB][at % SLAB] =
                there ? args.x[static_cast<u64>(first_token + token) * args.cols + k] : 0.0f;
        }
        __syncthreads();
        float sum[TOKENS];
#pragma unroll
        for (u32 token = 0; token < TOKENS; token++) sum[token] = 0.0f;
        const u32 slab = pass + lane;
        if (row < args.rows && slab < slabs) {
            const float* weights = args.weights + static_cast<u64>(row) * args.cols;
            const u32 end = smaller(args.cols, (slab + 1) * SLAB);
            for (u32 k = slab * SLAB; k < end; k += 8) {
                float w[8];
                load_octet(weights + k, w);
                const u32 at = k % SLAB;
#pragma unroll
                for (u32 token = 0; token < TOKENS; token++) {
                    const float4 a = *reinterpret_cast<const float4*>(&x[token][lane][at]);
                    const float4 b = *reinterpret_cast<const float4*>(&x[token][lane][at + 4]);
                    float s = sum[token];
                    s = fmaf(w[0], a.x, s);
                    s = fmaf(w[1], a.y, s);
                    s = fmaf(w[2], a.z, s);
                    s = fmaf(w[3], a.w, s);
                    s = fmaf(w[4], b.x, s);
                    s = fmaf(w[5], b.y, s);
                    s = fmaf(w[6], b.z, s);
                    s = fmaf(w[7], b.w, s);
                    sum[token] = s;
                }
            }
        }
#pragma unroll
        for (u32 token = 0; token < TOKENS; token++) sums[own_row][token][lane] = sum[token];
        __syncthreads();
        if (total_row < ROWS) {
            const u32 there = smaller(SLABS, slabs - pass);
            for (u32 i = 0; i < there; i++) total = total + sums[total_row][total_token][i];
        }
    }
    const u32 out_row = blockIdx.x * ROWS + total_row, token = first_token + total_token;
    if (total_row < ROWS && out_row < args.rows && token < args.tokens) {
        args.out[static_cast<u64>(token) * args.rows + out_row] = total;
    }
}

// Tiles of 64 rows and 64 tokens, as when prompts are read: every weight is read once for 64 tokens. A thread sums four rows
// times four tokens.
DEVICE void matmul_f32_tiles(const FloatMatmulArgs& args) {
    constexpr u32 SLAB = 128, RUN = 32, TILE = 64, STRIDE = TILE + 4;
    __shared__ __align__(16) float w[RUN][STRIDE];
    __shared__ __align__(16) float x[RUN][STRIDE];
    const u32 first_row = blockIdx.x * TILE, first_token = blockIdx.y * TILE;
    const u32 own_row = threadIdx.x % 16 * 4, own_token = threadIdx.x / 16 * 4;
    // What this thread reads, an octet of a row's run, and copies, that of a token's.
    const u32 source = threadIdx.x / 4, o = threadIdx.x % 4;
    const u32 weight_row = first_row + source, token = first_token + source;
    float total[4][4], sum[4][4];
#pragma unroll
    for (u32 i = 0; i < 16; i++) total[i / 4][i % 4] = sum[i / 4][i % 4] = 0.0f;
    for (u32 k = 0; k < args.cols; k += RUN) {
        const bool there = k + o * 8 < args.cols;
        float values[8];
#pragma unroll
        for (u32 i = 0; i < 8; i++) values[i] = 0.0f;
        if (there && weight_row < args.rows) {
            load_octet(args.weights + static_cast<u64>(weight_row) * args.cols + k + o * 8, values);
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) w[o * 8 + i][source] = values[i];
        const float* from = args.x + static_cast<u64>(token) * args.cols + k + o * 8;
#pragma unroll
        for (u32 i = 0; i < 8; i++) x[o * 8 + i][source] = there && token < args.tokens ? from[i] : 0.0f;
        __syncthreads();
        const u32 there_k = smaller(RUN, args.cols - k);
        for (u32 i = 0; i < there_k; i++) {
            const float4 a = *reinterpret_cast<const float4*>(&w[i][own_row]);
            const float4 b = *reinterpret_cast<const float4*>(&x[i][own_token]);
            const float rows[4] = {a.x, a.y, a.z, a.w}, tokens[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 r = 0; r < 4; r++) {
#pragma unroll
                for (u32 t = 0; t < 4; t++) sum[r][t] = fmaf(rows[r], tokens[t], sum[r][t]);
            }
        }
        if ((k + RUN) % SLAB == 0 || k + RUN >= args.cols) {
#pragma unroll
            for (u32 i = 0; i < 16; i++) {
                total[i / 4][i % 4] = total[i / 4][i % 4] + sum[i / 4][i % 4];
                sum[i / 4][i % 4] = 0.0f;
            }
        }
        __syncthreads();
    }
    for (u32 t = 0; t < 4; t++) {
        for (u32 r = 0; r < 4; r++) {
            const u32 row = first_row + own_row + r, at = first_token + own_token + t;
            if (row < args.rows && at < args.tokens) args.out[static_cast<u64>(at) * args.rows + row] = total[r][t];
        }
    }
}

KERNEL(matmul_f32_one, FloatMatmulArgs) { matmul_f32_few<1, 32>(args); }
KERNEL(matmul_f32_eight, FloatMatmulArgs) { matmul_f32_few<8, 8>(args); }
KERNEL(matmul_f32_many, FloatMatmulArgs) { matmul_f32_tiles(args); }
