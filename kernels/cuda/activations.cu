// Activations as tensor cores take them.
#include "matmul.cuh"

struct RoundArgs {
    // [tokens, cols]
    const float* x;
    // [runs, parts, tokens, 32]
    u16* values;
    // Of each token, what its products are to be multiplied with.
    float* factors;
    u32 cols;
    u32 tokens;
    u32 parts;
    // bf16, rather than f16.
    u32 is_brain;
};

// To the nearest, of two the even one.
DEVICE u16 float_to_brain(float value) {
    const u32 bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DEVICE float brain_to_float(u16 bits) { return bits_to_float(static_cast<u32>(bits) << 16); }

// Block i: token i. A row is multiplied by the power of two that brings its largest magnitude to [2^14, 2^15), where f16 is
// finite and what is tiny beside it still normal; each value is then a sum of parts, each the rest of those before it, rounded.
KERNEL(round_activations, RoundArgs) {
    __shared__ float maxima[BLOCK_THREADS / WARP];
    const u32 token = blockIdx.x;
    const float* x = args.x + static_cast<u64>(token) * args.cols;
    float largest = 0.0f;
    for (u32 k = threadIdx.x; k < args.cols; k += BLOCK_THREADS) largest = fmaxf(largest, fabsf(x[k]));
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (u32 i = 0; i < BLOCK_THREADS / WARP; i++) largest = fmaxf(largest, maxima[i]);
    // Powers of two by their exponents; a row of zeros or of what is nearly nothing has a power that is finite, too. What is
    // not finite stays so.
    const u32 exponent = float_to_bits(largest) >> 23;
    const u32 power = smaller(127 + 14 + 127 - exponent, 253);
    const float up = bits_to_float(power << 23);
    if (threadIdx.x == 0) args.factors[token] = bits_to_float((254 - power) << 23);
    const u32 padded = (args.cols + RUN - 1) / RUN * RUN;
    for (u32 k = threadIdx.x; k < padded; k += BLOCK_THREADS) {
        float rest = k < args.cols ? x[k] * up : 0.0f;
        for (u32 part = 0; part < args.parts; part++) {
            const u64 row = (static_cast<u64>(k / RUN) * args.parts + part) * args.tokens + token;
            const u16 bits = args.is_brain ? float_to_brain(rest) : float_to_half(rest);
            args.values[row * RUN + k % RUN] = bits;
            rest = rest - (args.is_brain ? brain_to_float(bits) : half_to_float(bits));
        }
    }
}
