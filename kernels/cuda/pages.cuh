// A KV page on the device has the layout of a page on disk (docs/page-format.md, kernels/src/page.rs): of a layer, K then V,
// each a run of 64 positions for every KV head; values lie row by row, keys turned in groups of sixteen positions.
#pragma once
#include "common.cuh"

static constexpr u32 PAGE_TOKENS = 64;
static constexpr u32 KEY_GROUP = 16;
static constexpr u32 Q8_VALUES = 32, Q8_BYTES = 34;

struct PageShape {
    // Of this layer's first head, in every page.
    u64 k_offset;
    u64 v_offset;
    u64 head_bytes;
    u32 row_bytes;
    u32 kv_heads;
    u32 head_dim;
    // Q8_0 blocks rather than half-precision numbers.
    u32 is_q8;
};

// One position's key, value by value.
struct Key {
    const u8* group;
    u32 lane;
    u32 is_q8;
    DEVICE Key(const PageShape& shape, const u8* page, u32 head, u32 position)
        : group(page + shape.k_offset + head * shape.head_bytes +
                static_cast<u64>(position / KEY_GROUP) * KEY_GROUP * shape.row_bytes),
          lane(position % KEY_GROUP), is_q8(shape.is_q8) {}
    DEVICE float operator[](u32 d) const {
        if (!is_q8) return half_to_float(reinterpret_cast<const u16*>(group)[d * KEY_GROUP + lane]);
        const u8* block = group + d / Q8_VALUES * (Q8_BYTES * KEY_GROUP);
        const float scale = half_to_float(reinterpret_cast<const u16*>(block)[lane]);
        return static_cast<float>(static_cast<signed char>(block[(d % Q8_VALUES + 2) * KEY_GROUP + lane])) * scale;
    }
};

// One value of a position's V row.
DEVICE float value_at(const PageShape& shape, const u8* page, u32 head, u32 position, u32 d) {
    const u8* row = page + shape.v_offset + head * shape.head_bytes + static_cast<u64>(position) * shape.row_bytes;
    if (!shape.is_q8) return half_to_float(reinterpret_cast<const u16*>(row)[d]);
    const u8* block = row + d / Q8_VALUES * Q8_BYTES;
    const float scale = half_to_float(*reinterpret_cast<const u16*>(block));
    return static_cast<float>(static_cast<signed char>(block[2 + d % Q8_VALUES])) * scale;
}
