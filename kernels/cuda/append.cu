// New keys and values: into the pages of their sequences, and packed for the way down to the mapped file.
#include "pages.cuh"

static constexpr u32 APPEND_THREADS = 128;
// The largest half-precision number: what lies beyond is stored as it, since an infinity would make every later score of its
// head undefined.
static constexpr float LARGEST_HALF = 65504.0f;

struct AppendArgs {
    // [rows, kv_heads, head_dim]
    const float* k;
    const float* v;
    // Of each row: its page, and its place in it.
    const u64* pages;
    const u32* places;
    // [rows, {K, V}, kv_heads, row_bytes]
    u8* down;
    PageShape shape;
};

// A comparison, not fminf: what is not a number stays so, and is seen.
DEVICE float limited(float x) { return x > LARGEST_HALF ? LARGEST_HALF : x < -LARGEST_HALF ? -LARGEST_HALF : x; }

// Block (row, head, K or V). A warp encodes 32 values at a time.
KERNEL(append_kv, AppendArgs) {
    const PageShape& shape = args.shape;
    const u32 row = blockIdx.x, head = blockIdx.y;
    const bool is_key = blockIdx.z == 0;
    const u64 at = static_cast<u64>(row) * shape.kv_heads + head;
    const float* values = (is_key ? args.k : args.v) + at * shape.head_dim;
    u8* page = reinterpret_cast<u8*>(args.pages[row]);
    const u32 place = args.places[row];
    u8* down = args.down + ((static_cast<u64>(row) * 2 + blockIdx.z) * shape.kv_heads + head) * shape.row_bytes;
    u8* run = page + (is_key ? shape.k_offset : shape.v_offset) + head * shape.head_bytes;
    // A key's part of n bytes is n * 16 bytes apart from the next one of its row, a value's n.
    u8* group = run + static_cast<u64>(place / KEY_GROUP) * KEY_GROUP * shape.row_bytes;
    u8* in_rows = run + static_cast<u64>(place) * shape.row_bytes;
    const u32 lane = threadIdx.x % WARP, key_lane = place % KEY_GROUP;
    const u32 blocks = (shape.head_dim + Q8_VALUES - 1) / Q8_VALUES;
    for (u32 block = threadIdx.x / WARP; block < blocks; block += APPEND_THREADS / WARP) {
        const u32 d = block * Q8_VALUES + lane;
        const bool there = d < shape.head_dim;
        const float value = there ? values[d] : 0.0f;
        if (!shape.is_q8) {
            const u16 half = float_to_half(limited(value));
            if (there) {
                reinterpret_cast<u16*>(down)[d] = half;
                if (is_key) reinterpret_cast<u16*>(group)[d * KEY_GROUP + key_lane] = half;
                else reinterpret_cast<u16*>(in_rows)[d] = half;
            }
            continue;
        }
        const float largest = warp_max(fabsf(value));
        const u16 scale = float_to_half(fminf(largest / 127.0f, LARGEST_HALF));
        const float step = half_to_float(scale), inverse = step > 0.0f ? 1.0f / step : 0.0f;
        const float scaled = value * inverse;
        // What is not a number becomes 0, as on the CPU.
        const float rounded = scaled == scaled ? fmaxf(fminf(roundf(scaled), 127.0f), -127.0f) : 0.0f;
        const u8 quant = static_cast<u8>(static_cast<signed char>(rounded));
        u8* packed = down + block * Q8_BYTES;
        packed[2 + lane] = quant;
        if (lane == 0) *reinterpret_cast<u16*>(packed) = scale;
        if (is_key) {
            u8* to = group + static_cast<u64>(block) * (Q8_BYTES * KEY_GROUP);
            to[(lane + 2) * KEY_GROUP + key_lane] = quant;
            if (lane == 0) reinterpret_cast<u16*>(to)[key_lane] = scale;
        } else {
            u8* to = in_rows + block * Q8_BYTES;
            to[2 + lane] = quant;
            if (lane == 0) *reinterpret_cast<u16*>(to) = scale;
        }
    }
}
