// Causal attention over pages. A query attends in fixed segments of 256 positions, as on the CPU: scores, their softmax, the
// weighted sum of values; segments are merged in order. That names positions only, so a query's bits do not depend on what
// else is computed with it, nor on whether its segments go to one block or to many.
#include "pages.cuh"

static constexpr u32 SEGMENT = BLOCK_THREADS;
// Queries of a block: consecutive rows of one sequence times the heads that share a KV head.
static constexpr u32 QUERIES = 8;
static constexpr u32 LARGEST_HEAD = 512;

// Some of the queries of a sequence, counted row by row, in each row head by head of a KV head's group.
struct Tile {
    // Batch row and position of the sequence's first row.
    u32 first_row;
    u32 first_position;
    // Where its pages begin in `pages`.
    u32 table;
    u32 first_query;
    u32 queries;
};

struct AttentionArgs {
    // [rows, heads, head_dim]
    const float* q;
    float* out;
    const Tile* tiles;
    const u64* pages;
    // [rows, heads, splits, 2 + head_dim]: maximum, sum and values of each segment, where blocks take one each.
    float* partials;
    PageShape shape;
    u32 heads;
    float scale;
    // Positions that a query sees, its own counted in; 0: all.
    u32 window;
    // 0: none.
    float soft_cap;
    // Segments of the longest sequence; 0: a block takes all segments of its queries.
    u32 splits;
};

// e^x for x <= 0, and exactly nothing where that is tiny or x is minus infinity.
DEVICE float softmax_weight(float x) { return fmaxf(expf(fmaxf(x, -87.0f)) - 1e-30f, 0.0f); }

DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }

// How a segment joins those before it.
struct Merge {
    float maximum, keep, take;
    DEVICE Merge(float before, float next) : maximum(fmaxf(before, next)) {
        keep = softmax_weight(before - maximum);
        take = softmax_weight(next - maximum);
    }
    DEVICE float of(float before, float next) const { return fmaf(before, keep, next * take); }
};

DEVICE u32 first_seen(u32 position, u32 window) {
    return window == 0 || position + 1 < window ? 0 : position + 1 - window;
}

KERNEL(attend, AttentionArgs) {
    DYNAMIC_SHARED(shared);
    __shared__ float total_maxima[QUERIES], total_sums[QUERIES];
    __shared__ float keeps[QUERIES], takes[QUERIES];
    // The positions of the segment that a query sees.
    __shared__ u32 begins[QUERIES], ends[QUERIES];
    const PageShape& shape = args.shape;
    const u32 head_dim = shape.head_dim, kv_head = blockIdx.y, group = args.heads / shape.kv_heads;
    float* queries = shared;
    float* weights = shared + QUERIES * head_dim;
    const Tile tile = args.tiles[blockIdx.x];
    const u64* table = args.pages + tile.table;
    const u32 own = threadIdx.x;
    const u32 first_position = tile.first_position + tile.first_query / group;
    const u32 last_position = tile.first_position + (tile.first_query + tile.queries - 1) / group;

    const float scale = args.soft_cap > 0.0f ? args.scale / args.soft_cap : args.scale;
    for (u32 i = own; i < QUERIES * head_dim; i += BLOCK_THREADS) {
        const u32 query = i / head_dim;
        float value = 0.0f;
        if (query < tile.queries) {
            const u32 number = tile.first_query + query;
            const u64 row = tile.first_row + number / group;
            value = args.q[(row * args.heads + kv_head * group + number % group) * head_dim + i % head_dim] * scale;
        }
        queries[i] = value;
    }
    if (own < QUERIES) {
        total_maxima[own] = minus_infinity();
        total_sums[own] = 0.0f;
    }

    // A thread adds up `MOST` queries at most for one place of the head, or for two where heads are wider than a block.
    const u32 places = (head_dim + WARP - 1) / WARP * WARP;
    const u32 sharers = places < BLOCK_THREADS ? BLOCK_THREADS / places : 1;
    const u32 place = sharers > 1 ? own % places : own, sharer = sharers > 1 ? own / places : 0;
    const bool adds = sharer < sharers;
    constexpr u32 WIDE = LARGEST_HEAD / BLOCK_THREADS;
    float totals[WIDE][QUERIES];
#pragma unroll
    for (u32 i = 0; i < WIDE * QUERIES; i++) totals[i / QUERIES][i % QUERIES] = 0.0f;

    u32 segment = first_seen(first_position, args.window) / SEGMENT;
    u32 last_segment = last_position / SEGMENT;
    if (args.splits > 0) {
        if (blockIdx.z < segment || blockIdx.z > last_segment) return;
        segment = last_segment = blockIdx.z;
    }
    for (; segment <= last_segment; segment++) {
        const u32 start = segment * SEGMENT;
        if (own < QUERIES) {
            u32 begin = 0, end = 0;
            if (own < tile.queries) {
                const u32 position = tile.first_position + (tile.first_query + own) / group;
                const u32 seen = larger(first_seen(position, args.window), start);
                const u32 after = smaller(position + 1, start + SEGMENT);
                if (seen < after) {
                    begin = seen - start;
                    end = after - start;
                }
            }
            begins[own] = begin;
            ends[own] = end;
        }
        __syncthreads();
        // What any of the queries sees.
        u32 begin = SEGMENT, end = 0;
        for (u32 query = 0; query < QUERIES; query++) {
            if (begins[query] < ends[query]) {
                begin = smaller(begin, begins[query]);
                end = larger(end, ends[query]);
            }
        }

        // Scores: a thread has a position of the segment, and its key.
        if (own >= begin && own < end) {
            const u32 position = start + own;
            const u8* page = reinterpret_cast<const u8*>(table[position / PAGE_TOKENS]);
            const Key key(shape, page, kv_head, position % PAGE_TOKENS);
            float scores[QUERIES];
#pragma unroll
            for (u32 query = 0; query < QUERIES; query++) scores[query] = 0.0f;
            for (u32 d = 0; d < head_dim; d++) {
                const float k = key[d];
#pragma unroll
                for (u32 query = 0; query < QUERIES; query++) {
                    scores[query] = fmaf(queries[query * head_dim + d], k, scores[query]);
                }
            }
#pragma unroll
            for (u32 query = 0; query < QUERIES; query++) {
                float score = scores[query];
                if (args.soft_cap > 0.0f) score = args.soft_cap * tanhf(score);
                weights[query * SEGMENT + own] =
                    own >= begins[query] && own < ends[query] ? score : minus_infinity();
            }
        } else {
#pragma unroll
            for (u32 query = 0; query < QUERIES; query++) weights[query * SEGMENT + own] = minus_infinity();
        }
        __syncthreads();

        // Weights: a warp has a query.
        {
            const u32 query = own / WARP, lane = own % WARP;
            float* scores = weights + query * SEGMENT;
            float maximum = minus_infinity();
            for (u32 i = lane; i < SEGMENT; i += WARP) maximum = fmaxf(maximum, scores[i]);
            maximum = warp_max(maximum);
            const bool sees = begins[query] < ends[query];
            float sum = 0.0f;
            for (u32 i = lane; i < SEGMENT; i += WARP) {
                const float weight = sees ? softmax_weight(scores[i] - maximum) : 0.0f;
                scores[i] = weight;
                sum = sum + weight;
            }
            sum = warp_sum(sum);
            if (lane == 0) {
                const Merge merge(total_maxima[query], maximum);
                // The first segment that a query sees is taken as it is.
                const bool is_first = total_sums[query] == 0.0f;
                keeps[query] = merge.keep;
                takes[query] = is_first ? -1.0f : merge.take;
                if (sees) {
                    total_sums[query] = is_first ? sum : merge.of(total_sums[query], sum);
                    total_maxima[query] = is_first ? maximum : merge.maximum;
                }
            }
        }
        __syncthreads();

        // Values: a thread has a place of the head.
#pragma unroll
        for (u32 wide = 0; wide < WIDE; wide++) {
            const u32 d = place + wide * BLOCK_THREADS;
            if (!adds || d >= head_dim) continue;
            float results[QUERIES];
#pragma unroll
            for (u32 i = 0; i < QUERIES; i++) results[i] = 0.0f;
            for (u32 at = begin; at < end; at++) {
                const u32 position = start + at;
                const u8* page = reinterpret_cast<const u8*>(table[position / PAGE_TOKENS]);
                const float value = value_at(shape, page, kv_head, position % PAGE_TOKENS, d);
#pragma unroll
                for (u32 i = 0; i < QUERIES; i++) {
                    const u32 query = sharer + i * sharers;
                    if (query >= QUERIES) break;
                    // What a query does not see must not touch its sum, not even with a factor of zero.
                    const float weight = weights[query * SEGMENT + at];
                    if (weight != 0.0f) results[i] = fmaf(weight, value, results[i]);
                }
            }
#pragma unroll
            for (u32 i = 0; i < QUERIES; i++) {
                const u32 query = sharer + i * sharers;
                if (query >= QUERIES || begins[query] >= ends[query]) continue;
                const float total = totals[wide][i];
                totals[wide][i] = takes[query] < 0.0f ? results[i] : fmaf(total, keeps[query], results[i] * takes[query]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (u32 wide = 0; wide < WIDE; wide++) {
        const u32 d = place + wide * BLOCK_THREADS;
        if (!adds || d >= head_dim) continue;
#pragma unroll
        for (u32 i = 0; i < QUERIES; i++) {
            const u32 query = sharer + i * sharers;
            if (query >= tile.queries) continue;
            const u32 number = tile.first_query + query;
            const u64 row = tile.first_row + number / group;
            const u64 head = row * args.heads + kv_head * group + number % group;
            if (args.splits > 0) {
                float* partial = args.partials + (head * args.splits + blockIdx.z) * (2 + head_dim);
                partial[2 + d] = totals[wide][i];
                if (d == 0) {
                    partial[0] = total_maxima[query];
                    partial[1] = total_sums[query];
                }
            } else {
                // Adding zero makes one of both zeros.
                args.out[head * head_dim + d] = fmaf(totals[wide][i], 1.0f / total_sums[query], 0.0f);
            }
        }
    }
}

struct MergeArgs {
    // [rows, heads, splits, 2 + head_dim]
    const float* partials;
    float* out;
    // Of each row.
    const u32* positions;
    u32 heads;
    u32 head_dim;
    u32 window;
    u32 splits;
};

// Block i: query i of all, [rows, heads]. The same merges, in the same order, as in a block that takes all segments.
KERNEL(merge_segments, MergeArgs) {
    const u32 position = args.positions[blockIdx.x / args.heads];
    const u32 first = first_seen(position, args.window) / SEGMENT, last = position / SEGMENT;
    const u64 stride = 2 + args.head_dim;
    const float* partials = args.partials + static_cast<u64>(blockIdx.x) * args.splits * stride;
    for (u32 d = threadIdx.x; d < args.head_dim; d += BLOCK_THREADS) {
        const float* partial = partials + first * stride;
        float maximum = partial[0], sum = partial[1], total = partial[2 + d];
        for (u32 segment = first + 1; segment <= last; segment++) {
            partial = partials + segment * stride;
            const Merge merge(maximum, partial[0]);
            maximum = merge.maximum;
            sum = merge.of(sum, partial[1]);
            total = merge.of(total, partial[2 + d]);
        }
        args.out[static_cast<u64>(blockIdx.x) * args.head_dim + d] = fmaf(total, 1.0f / sum, 0.0f);
    }
}
