// What is done row by row or value by value. A row's sums are taken in an order that its width alone fixes.
#include "common.cuh"

static constexpr u32 NORM_THREADS = 128;

struct NormArgs {
    const float* x;
    const float* weight;
    // May be `x`.
    float* out;
    u32 width;
    float eps;
};

// Block i: row i. x / sqrt(mean(x^2) + eps) * weight.
KERNEL(rms_norm, NormArgs) {
    __shared__ float parts[NORM_THREADS / WARP];
    const float* x = args.x + static_cast<u64>(blockIdx.x) * args.width;
    float* out = args.out + static_cast<u64>(blockIdx.x) * args.width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < args.width; i += NORM_THREADS) squares = fmaf(x[i], x[i], squares);
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = squares;
    __syncthreads();
    const float sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(args.width) + args.eps);
    for (u32 i = threadIdx.x; i < args.width; i += NORM_THREADS) out[i] = x[i] * scale * args.weight[i];
}

struct PointwiseArgs {
    float* x;
    const float* other;
    u64 count;
    // Of a row, where `other` is a row's or has a value for each row.
    u32 width;
    float factor;
};

DEVICE u64 own_value() { return static_cast<u64>(blockIdx.x) * BLOCK_THREADS + threadIdx.x; }

// x += factor * other
KERNEL(add_scaled, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) args.x[i] = fmaf(args.other[i], args.factor, args.x[i]);
}

// x += other, on every row
KERNEL(add_bias, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) args.x[i] = args.x[i] + args.other[i % args.width];
}

// x *= other[row]
KERNEL(scale_rows, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) args.x[i] = args.x[i] * args.other[i / args.width];
}

// x = silu(x) * other
KERNEL(silu_gate, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) args.x[i] = args.x[i] / (1.0f + expf(-args.x[i])) * args.other[i];
}

// x = gelu(x) * other, with the tanh form of GELU: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
KERNEL(gelu_gate, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) {
        const float x = args.x[i];
        const float slope = fmaf(x * x, -1.5957691216f * 0.044715f, -1.5957691216f);
        args.x[i] = x / (1.0f + expf(x * slope)) * args.other[i];
    }
}

// x *= factor
KERNEL(scale, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) args.x[i] = args.x[i] * args.factor;
}

// x = factor * tanh(x / factor)
KERNEL(soft_cap, PointwiseArgs) {
    const u64 i = own_value();
    if (i < args.count) args.x[i] = args.factor * tanhf(args.x[i] / args.factor);
}

struct GatherArgs {
    const float* from;
    const u32* rows;
    float* to;
    u32 width;
};

// Block i: row i of `to` is row rows[i] of `from`.
KERNEL(gather_rows, GatherArgs) {
    const float* from = args.from + static_cast<u64>(args.rows[blockIdx.x]) * args.width;
    float* to = args.to + static_cast<u64>(blockIdx.x) * args.width;
    for (u32 i = threadIdx.x; i < args.width; i += BLOCK_THREADS) to[i] = from[i];
}

struct ScatterArgs {
    const float* from;
    const u32* rows;
    const float* factors;
    float* to;
    u32 width;
};

// Block i: row rows[i] of `to` += factors[i] * row i of `from`; no row comes twice.
KERNEL(scatter_rows, ScatterArgs) {
    const float* from = args.from + static_cast<u64>(blockIdx.x) * args.width;
    float* to = args.to + static_cast<u64>(args.rows[blockIdx.x]) * args.width;
    const float factor = args.factors[blockIdx.x];
    for (u32 i = threadIdx.x; i < args.width; i += BLOCK_THREADS) to[i] = fmaf(from[i], factor, to[i]);
}

struct LikeliestArgs {
    // [blocks, width]
    const float* logits;
    u32* out;
    u32 width;
};

// Block i: the place of the first of the largest values of row i; 0 where none is larger than minus infinity.
KERNEL(likeliest, LikeliestArgs) {
    __shared__ float values[BLOCK_THREADS];
    __shared__ u32 places[BLOCK_THREADS];
    const float* logits = args.logits + static_cast<u64>(blockIdx.x) * args.width;
    const u32 own = threadIdx.x;
    float value = bits_to_float(0xff800000u);
    u32 place = 0;
    // What is not a number is larger than nothing.
    for (u32 i = own; i < args.width; i += BLOCK_THREADS) {
        if (logits[i] > value) {
            value = logits[i];
            place = i;
        }
    }
    values[own] = value;
    places[own] = place;
    for (u32 half = BLOCK_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (own >= half) continue;
        const float other = values[own + half];
        const bool is_first = other == values[own] && places[own + half] < places[own];
        if (other > values[own] || is_first) {
            values[own] = other;
            places[own] = places[own + half];
        }
    }
    if (own == 0) args.out[blockIdx.x] = places[0];
}

struct RopeArgs {
    float* x;
    // [rows, pairs]
    const float* cos;
    const float* sin;
    u32 heads;
    u32 head_dim;
    u32 pairs;
    // Pairs are neighbours, rather than half the rotated values apart.
    u32 interleaved;
    u64 count;
};

// Thread i: pair i of all, [rows, heads, pairs]. Every product is rounded, as on the CPU.
KERNEL(rope, RopeArgs) {
    const u64 i = own_value();
    if (i >= args.count) return;
    const u64 head = i / args.pairs, row = head / args.heads;
    const u32 pair = static_cast<u32>(i % args.pairs);
    float* first = args.x + head * args.head_dim + (args.interleaved ? 2 * pair : pair);
    float* second = first + (args.interleaved ? 1 : args.pairs);
    const float c = args.cos[row * args.pairs + pair], s = args.sin[row * args.pairs + pair];
    const float x = *first, y = *second;
    *first = x * c - y * s;
    *second = x * s + y * c;
}
