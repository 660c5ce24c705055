// Weights as they lie in a model's file, decoded where they are multiplied. Each quantised type names a run of 32 values of a
// row: the constructor reads its scales, `octet(o, out)` decodes values 8 o to 8 o + 7. The arithmetic is that of
// kernels/src/quant.rs, operation by operation; nothing here may be contracted to fused multiply-adds (-fmad=false).
#pragma once
#include "common.cuh"

static constexpr u32 RUN = 32;

// Of a type, the values and the bytes of a block.
template <u32 OWN_VALUES, u32 OWN_BYTES>
struct Quantised {
    static constexpr bool IS_FLOAT = false, IS_BRAIN = false;
    static constexpr u32 VALUES = OWN_VALUES, BYTES = OWN_BYTES;
};

DEVICE float half_at(const u8* block, int at) { return half_to_float(*reinterpret_cast<const u16*>(block + at)); }

// Eight consecutive bytes, in the widest loads that the type's alignment allows.
template <typename Unit>
struct Bytes8 {
    Unit units[8 / sizeof(Unit)];
    DEVICE explicit Bytes8(const u8* at) {
#pragma unroll
        for (u32 i = 0; i < 8 / sizeof(Unit); i++) units[i] = reinterpret_cast<const Unit*>(at)[i];
    }
    DEVICE u32 operator[](u32 i) const {
        return static_cast<u32>(units[i / sizeof(Unit)] >> (8 * (i % sizeof(Unit)))) & 0xffu;
    }
};

DEVICE float from_signed(u32 byte) { return static_cast<float>(static_cast<signed char>(byte)); }

// Floats of 16 bits go to tensor cores as they are.
struct F16 {
    static constexpr bool IS_FLOAT = true, IS_BRAIN = false;
};

struct BF16 {
    static constexpr bool IS_FLOAT = true, IS_BRAIN = true;
};

// Of the simple types, value j is the low nibble of byte j, value j + 16 its high nibble.
template <typename Unit>
struct Nibbles {
    Bytes8<Unit> bytes;
    u32 shift;
    DEVICE Nibbles(const u8* quants, u32 o) : bytes(quants + (o % 2) * 8), shift(o / 2 * 4) {}
    DEVICE int operator[](u32 i) const { return static_cast<int>((bytes[i] >> shift) & 0x0fu); }
};

struct Q4_0 : Quantised<32, 18> {
    const u8* block;
    float d;
    DEVICE Q4_0(const u8* row, u32 run) : block(row + run * 18), d(half_at(block, 0)) {}
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u16> quants(block + 2, o);
        for (u32 i = 0; i < 8; i++) out[i] = static_cast<float>(quants[i] - 8) * d;
    }
};

struct Q4_1 : Quantised<32, 20> {
    const u8* block;
    float d, m;
    DEVICE Q4_1(const u8* row, u32 run) : block(row + run * 20), d(half_at(block, 0)), m(half_at(block, 2)) {}
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u32> quants(block + 4, o);
        for (u32 i = 0; i < 8; i++) out[i] = static_cast<float>(quants[i]) * d + m;
    }
};

struct Q5_0 : Quantised<32, 22> {
    const u8* block;
    float d;
    u32 high;
    DEVICE Q5_0(const u8* row, u32 run) : block(row + run * 22), d(half_at(block, 0)) {
        const u16* words = reinterpret_cast<const u16*>(block + 2);
        high = words[0] | static_cast<u32>(words[1]) << 16;
    }
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u16> quants(block + 6, o);
        for (u32 i = 0; i < 8; i++) {
            const int fifth = static_cast<int>((high >> (o * 8 + i)) & 1u) << 4;
            out[i] = static_cast<float>((quants[i] | fifth) - 16) * d;
        }
    }
};

struct Q5_1 : Quantised<32, 24> {
    const u8* block;
    float d, m;
    u32 high;
    DEVICE Q5_1(const u8* row, u32 run)
        : block(row + run * 24), d(half_at(block, 0)), m(half_at(block, 2)),
          high(*reinterpret_cast<const u32*>(block + 4)) {}
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u32> quants(block + 8, o);
        for (u32 i = 0; i < 8; i++) {
            const int fifth = static_cast<int>((high >> (o * 8 + i)) & 1u) << 4;
            out[i] = static_cast<float>(quants[i] | fifth) * d + m;
        }
    }
};

struct Q8_0 : Quantised<32, 34> {
    const u8* block;
    float d;
    DEVICE Q8_0(const u8* row, u32 run) : block(row + run * 34), d(half_at(block, 0)) {}
    DEVICE void octet(u32 o, float* out) const {
        const Bytes8<u16> quants(block + 2 + o * 8);
        for (u32 i = 0; i < 8; i++) out[i] = from_signed(quants[i]) * d;
    }
};

// Of the types with blocks of 256 values, run j of a block is its values 32 j to 32 j + 31; sixteens of Q2_K, Q3_K and Q6_K
// have a scale each.

struct Q2_K : Quantised<256, 84> {
    const u8* quants;
    u32 shift;
    float scale[2], minimum[2];
    DEVICE Q2_K(const u8* row, u32 run) {
        const u8* block = row + run / 8 * 84;
        const u32 j = run % 8;
        const float d = half_at(block, 80), dmin = half_at(block, 82);
        for (u32 i = 0; i < 2; i++) {
            const u32 packed = block[2 * j + i];
            scale[i] = d * static_cast<float>(packed & 0x0fu);
            minimum[i] = dmin * static_cast<float>(packed >> 4);
        }
        quants = block + 16 + j / 4 * 32;
        shift = j % 4 * 2;
    }
    DEVICE void octet(u32 o, float* out) const {
        const Bytes8<u32> bytes(quants + o * 8);
        const float s = o < 2 ? scale[0] : scale[1], m = o < 2 ? minimum[0] : minimum[1];
        for (u32 i = 0; i < 8; i++) out[i] = s * static_cast<float>((bytes[i] >> shift) & 3u) - m;
    }
};

struct Q3_K : Quantised<256, 110> {
    const u8* high;
    const u8* quants;
    u32 j;
    float scale[2];
    DEVICE Q3_K(const u8* row, u32 run) {
        const u8* block = row + run / 8 * 110;
        j = run % 8;
        const float d = half_at(block, 108);
        const u8* scales = block + 96;
        for (u32 i = 0; i < 2; i++) {
            const u32 group = 2 * j + i;
            const u32 low = group < 8 ? scales[group] & 0x0fu : static_cast<u32>(scales[group - 8]) >> 4;
            const u32 upper = (static_cast<u32>(scales[8 + group % 4]) >> (group / 4 * 2)) & 3u;
            scale[i] = d * static_cast<float>(static_cast<int>(low | upper << 4) - 32);
        }
        high = block;
        quants = block + 32 + j / 4 * 32;
    }
    DEVICE void octet(u32 o, float* out) const {
        const Bytes8<u16> low(quants + o * 8), upper(high + o * 8);
        const float s = o < 2 ? scale[0] : scale[1];
        for (u32 i = 0; i < 8; i++) {
            const int offset = (upper[i] >> j) & 1u ? 0 : 4;
            out[i] = s * static_cast<float>(static_cast<int>((low[i] >> (j % 4 * 2)) & 3u) - offset);
        }
    }
};

// The 6-bit scale and minimum of run `j` in the twelve packed bytes of Q4_K and Q5_K.
DEVICE void scale_and_minimum(const u8* packed, u32 j, u32& scale, u32& minimum) {
    if (j < 4) {
        scale = packed[j] & 63u;
        minimum = packed[j + 4] & 63u;
    } else {
        scale = (packed[j + 4] & 0x0fu) | (static_cast<u32>(packed[j - 4]) >> 6) << 4;
        minimum = (static_cast<u32>(packed[j + 4]) >> 4) | (static_cast<u32>(packed[j]) >> 6) << 4;
    }
}

struct Q4_K : Quantised<256, 144> {
    const u8* quants;
    u32 shift;
    float scale, minimum;
    DEVICE Q4_K(const u8* row, u32 run) {
        const u8* block = row + run / 8 * 144;
        const u32 j = run % 8;
        u32 s, m;
        scale_and_minimum(block + 4, j, s, m);
        scale = half_at(block, 0) * static_cast<float>(s);
        minimum = half_at(block, 2) * static_cast<float>(m);
        quants = block + 16 + j / 2 * 32;
        shift = j % 2 * 4;
    }
    DEVICE void octet(u32 o, float* out) const {
        const Bytes8<u32> bytes(quants + o * 8);
        for (u32 i = 0; i < 8; i++) out[i] = scale * static_cast<float>((bytes[i] >> shift) & 0x0fu) - minimum;
    }
};

struct Q5_K : Quantised<256, 176> {
    const u8* block;
    // Run of the block.
    u32 j;
    float scale, minimum;
    DEVICE Q5_K(const u8* row, u32 run) : block(row + run / 8 * 176), j(run % 8) {
        u32 s, m;
        scale_and_minimum(block + 4, j, s, m);
        scale = half_at(block, 0) * static_cast<float>(s);
        minimum = half_at(block, 2) * static_cast<float>(m);
    }
    DEVICE void octet(u32 o, float* out) const {
        const Bytes8<u32> low(block + 48 + j / 2 * 32 + o * 8), upper(block + 16 + o * 8);
        for (u32 i = 0; i < 8; i++) {
            const u32 quant = ((low[i] >> (j % 2 * 4)) & 0x0fu) | ((upper[i] >> j) & 1u) << 4;
            out[i] = scale * static_cast<float>(quant) - minimum;
        }
    }
};

struct Q6_K : Quantised<256, 210> {
    const u8* low;
    const u8* high;
    u32 low_shift, high_shift;
    float scale[2];
    DEVICE Q6_K(const u8* row, u32 run) {
        const u8* block = row + run / 8 * 210;
        const u32 j = run % 8, half = j / 4, quarter = j % 4;
        const float d = half_at(block, 208);
        for (u32 i = 0; i < 2; i++) scale[i] = d * from_signed(block[192 + 2 * j + i]);
        low = block + half * 64 + quarter % 2 * 32;
        high = block + 128 + half * 32;
        low_shift = quarter / 2 * 4;
        high_shift = quarter * 2;
    }
    DEVICE void octet(u32 o, float* out) const {
        const Bytes8<u16> nibbles(low + o * 8), pairs(high + o * 8);
        const float s = o < 2 ? scale[0] : scale[1];
        for (u32 i = 0; i < 8; i++) {
            const u32 quant = ((nibbles[i] >> low_shift) & 0x0fu) | ((pairs[i] >> high_shift) & 3u) << 4;
            out[i] = s * static_cast<float>(static_cast<int>(quant) - 32);
        }
    }
};

// The sixteen signed levels of a type, four to a word: a lookup without memory.
struct Levels {
    u32 words[4];
    DEVICE float operator[](int index) const {
        const u32 low = index & 4 ? words[1] : words[0], high = index & 4 ? words[3] : words[2];
        return from_signed(((index & 8 ? high : low) >> (8 * (index & 3))) & 0xffu);
    }
};

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
DEVICE Levels iq4_levels() { return Levels{{0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}}; }
// 0 1 2 3 4 6 8 12, and the same negative
DEVICE Levels mxfp4_levels() { return Levels{{0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}}; }

struct IQ4_NL : Quantised<32, 18> {
    const u8* block;
    float d;
    DEVICE IQ4_NL(const u8* row, u32 run) : block(row + run * 18), d(half_at(block, 0)) {}
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u16> quants(block + 2, o);
        const Levels levels = iq4_levels();
        for (u32 i = 0; i < 8; i++) out[i] = d * levels[quants[i]];
    }
};

struct IQ4_XS : Quantised<256, 136> {
    const u8* quants;
    float scale;
    DEVICE IQ4_XS(const u8* row, u32 run) {
        const u8* block = row + run / 8 * 136;
        const u32 j = run % 8;
        const u32 low = (static_cast<u32>(block[4 + j / 2]) >> (j % 2 * 4)) & 0x0fu;
        const u32 high = (static_cast<u32>(*reinterpret_cast<const u16*>(block + 2)) >> (j * 2)) & 3u;
        scale = half_at(block, 0) * static_cast<float>(static_cast<int>(low | high << 4) - 32);
        quants = block + 8 + j * 16;
    }
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u32> indices(quants, o);
        const Levels levels = iq4_levels();
        for (u32 i = 0; i < 8; i++) out[i] = scale * levels[indices[i]];
    }
};

struct MXFP4 : Quantised<32, 17> {
    const u8* block;
    float d;
    DEVICE MXFP4(const u8* row, u32 run) : block(row + run * 17) {
        const u32 exponent = block[0];
        d = bits_to_float(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    }
    DEVICE void octet(u32 o, float* out) const {
        const Nibbles<u8> quants(block + 1, o);
        const Levels levels = mxfp4_levels();
        for (u32 i = 0; i < 8; i++) out[i] = levels[quants[i]] * d;
    }
};

// Every type of weights that tensor cores multiply: X(name in kernel names).
#define EACH_TENSOR_TYPE(X) \
    X(F16) X(BF16) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS) \
    X(MXFP4)
