// PERMUTE: a stable counting sort of slots by local expert, with each expert's group padded to whole blocks.
//
// Ranks inside a warp come from matching lanes, between warps from a table in shared memory, between blocks from histograms
// in device memory. Slots are taken in ascending order throughout, so an expert's slots stay in order and no result depends
// on timing. Few slots: one launch, in which every block looks at all slots and places those of its own experts. More: one
// launch counts, a second places.

#include "scan.cuh"
#include "slots.cuh"

namespace moeproof {

constexpr int WARPS = 16;
constexpr int STEPS = 8;                               // slots of a thread, of those that a block places
constexpr int SMALL_STEPS = 16;                        // slots of a thread, of all, at most
constexpr int SMALL = WARPS * WARP * SMALL_STEPS;      // slots that are sorted in one launch
constexpr int FEW_WARPS = 4;                           // of a block where slots are few
constexpr int BLOCKS = 128;                            // about as many as multiprocessors

struct Align {
    Slots slots;
    int num_slots;
    int block_m;         // rows of a block; 0 = batched layout
    int capacity;        // batched layout: rows of an expert's region
    int P, B;            // rows and blocks that the outputs hold
    int* target;         // blocks: (P,) slot of each row. batched: (S,) row of each slot
    int* block_expert;   // (B,)
    int* num_padded;     // (1,)
    int* counts;         // (e,)
    int* histogram;      // (chunks, e)
    int chunk;           // slots of a block, in the two-launch form

    __device__ int padded(int count) const { return block_m ? round_up(count, block_m) : 0; }
};

// A block's slots, `steps` for each thread: warps own consecutive runs, and a warp's steps follow each other.
struct Ranks {
    int local[STEPS];  // local expert, -1 where the slot is dead
    int rank[STEPS];   // earlier slots of the same expert in the same warp
};

__device__ inline int slot_of(int first, int steps, int step) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    return first + (warp * steps + step) * WARP + lane;
}

// Where the slots of this warp's run, which begin in a block's `first`, end.
__device__ inline int last_of(const Align& a, int first, int steps) {
    return min(slot_of(first, steps, steps) - static_cast<int>(threadIdx.x) % WARP, a.num_slots);
}

// Ranks of this block's slots; before[warp][expert] becomes the count of slots in earlier warps, total[expert] of all.
__device__ inline Ranks rank_slots(const Align& a, int first, int steps, uint16_t* before, int* total) {
    const int e = a.slots.num_local;
    for (int i = threadIdx.x; i < WARPS * e; i += WARPS * WARP) before[i] = 0;
    Ranks r;
    a.slots.locals(slot_of(first, steps, 0), WARP, last_of(a, first, steps), r.local);
    __syncthreads();
    uint16_t* mine = before + threadIdx.x / WARP * e;
    const unsigned earlier = (1u << threadIdx.x % WARP) - 1;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
        r.rank[j] = 0;
        if (j >= steps) continue;
        const unsigned peers = __match_any_sync(ALL, r.local[j]);
        const bool live = r.local[j] >= 0;
        const int seen = live ? mine[r.local[j]] : 0;
        r.rank[j] = seen + __popc(peers & earlier);
        __syncwarp();
        if (live && (peers & earlier) == 0) mine[r.local[j]] = static_cast<uint16_t>(seen + __popc(peers));
        __syncwarp();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < e; i += WARPS * WARP) {
        int sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const int count = before[w * e + i];
            before[w * e + i] = static_cast<uint16_t>(sum);
            sum += count;
        }
        total[i] = sum;
    }
    __syncthreads();
    return r;
}

__device__ inline int batched_row(const Align& a, int local, int position) {
    return local >= 0 && position < a.capacity ? local * a.capacity + position : -1;
}

// Few slots: each block counts all of them, so that it knows where its own experts' groups begin, and places only those. Each
// thread takes EACH slots: the fewer, the less stands in a row between the ids and their places.
template <int NUM_WARPS, int EACH>
__global__ void __launch_bounds__(NUM_WARPS* WARP) align_small_kernel(const Align a, int own) {
    extern __shared__ int memory[];
    constexpr int THREADS = NUM_WARPS * WARP;
    const int e = a.slots.num_local, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, thread = threadIdx.x;
    int* count = memory;
    int* end = count + e;   // of each group, in row blocks
    int* before = end + e;  // slots of own experts in each warp
    for (int i = thread; i < e; i += THREADS) count[i] = 0;
    int local[EACH];
    a.slots.locals(slot_of(0, EACH, 0), WARP, a.num_slots, local);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH; ++j)
        if (local[j] >= 0) atomicAdd(count + local[j], 1);
    for (int x = 0; x < own; ++x) {
        const int expert = blockIdx.x * own + x;
        int sum = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) sum += __popc(__ballot_sync(ALL, local[j] == expert));
        if (lane == 0) before[x * NUM_WARPS + warp] = sum;
    }
    __syncthreads();
    if (a.block_m) {
        for (int i = thread; i < e; i += THREADS) end[i] = (count[i] + a.block_m - 1) / a.block_m;
        __syncthreads();
        block_scan<NUM_WARPS>(end, e);
    }

    for (int x = 0; x < own; ++x) {
        const int expert = blockIdx.x * own + x;
        if (expert >= e) break;
        const int live = count[expert], first_block = a.block_m && expert ? end[expert - 1] : 0, first = first_block * a.block_m;
        int position = 0;
#pragma unroll
        for (int w = 0; w < NUM_WARPS - 1; ++w)
            if (w < warp) position += before[x * NUM_WARPS + w];
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const unsigned peers = __ballot_sync(ALL, local[j] == expert);
            if (local[j] == expert) {
                const int slot = slot_of(0, EACH, j), at = position + __popc(peers & ((1u << lane) - 1));
                if (a.block_m) a.target[first + at] = slot;
                else a.target[slot] = batched_row(a, expert, at);
            }
            position += __popc(peers);
        }
        if (thread == 0) a.counts[expert] = live;
        if (!a.block_m) continue;
        const int last_block = end[expert], last = last_block * a.block_m;
        for (int p = first + live + thread; p < last; p += THREADS) a.target[p] = a.num_slots;
        for (int b = first_block + thread; b < last_block; b += THREADS) a.block_expert[b] = expert;
    }
    // What belongs to no expert: dead slots, or the unused tail.
    if (!a.block_m) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int slot = slot_of(0, EACH, j);
            if (blockIdx.x == 0 && slot < a.num_slots && local[j] < 0) a.target[slot] = -1;
        }
        return;
    }
    const int used = end[e - 1], all = gridDim.x * THREADS, one = blockIdx.x * THREADS + thread;
    for (int p = used * a.block_m + one; p < a.P; p += all) a.target[p] = a.num_slots;
    for (int b = used + one; b < a.B; b += all) a.block_expert[b] = -1;
    if (one == 0) *a.num_padded = used * a.block_m;
}

// First of two launches: histogram[block][expert], and padding laid down everywhere.
__global__ void __launch_bounds__(WARPS* WARP) align_count_kernel(const Align a) {
    extern __shared__ int bins[];
    const int e = a.slots.num_local, threads = WARPS * WARP;
    for (int i = threadIdx.x; i < e; i += threads) bins[i] = 0;
    __syncthreads();
    const int first = blockIdx.x * a.chunk;
    int local[STEPS];
    a.slots.locals(first + static_cast<int>(threadIdx.x), threads, min(first + a.chunk, a.num_slots), local);
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
        if (local[j] >= 0) atomicAdd(bins + local[j], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < e; i += threads) a.histogram[static_cast<long long>(blockIdx.x) * e + i] = bins[i];
    if (a.block_m)
        for (int p = blockIdx.x * threads + threadIdx.x; p < a.P; p += gridDim.x * threads) a.target[p] = a.num_slots;
}

// Local expert of each block from the ends of the experts' groups; -1 behind the last.
__device__ inline void map_blocks(const Align& a, const int* end, int first, int stride) {
    const int e = a.slots.num_local;
    for (int b = first; b < a.B; b += stride) {
        int low = 0, high = e;  // experts that end at or before this block
        while (low < high) {
            const int middle = (low + high) / 2;
            if (end[middle] <= b * a.block_m) low = middle + 1;
            else high = middle;
        }
        a.block_expert[b] = low < e ? low : -1;
    }
}

// Second launch: every block sums all histograms, then places its own slots.
__global__ void __launch_bounds__(WARPS* WARP) align_place_kernel(const Align a) {
    extern __shared__ int memory[];
    const int e = a.slots.num_local, threads = WARPS * WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int* total = memory;      // of all blocks, then the end of each group
    int* earlier = total + e;  // of earlier blocks, then the first row of this block's slots
    int* own = earlier + e;
    uint16_t* before = reinterpret_cast<uint16_t*>(own + e);
    for (int i = threadIdx.x; i < 2 * e; i += threads) total[i] = 0;
    __syncthreads();
    for (int i = lane; i < e; i += WARP) {
        int sum = 0, part = 0;
#pragma unroll 8
        for (int c = warp; c < static_cast<int>(gridDim.x); c += WARPS) {
            const int bin = a.histogram[static_cast<long long>(c) * e + i];
            sum += bin;
            part += c < static_cast<int>(blockIdx.x) ? bin : 0;
        }
        atomicAdd(total + i, sum);
        atomicAdd(earlier + i, part);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < e; i += threads) {
        const int count = total[i];
        if (blockIdx.x == 0) a.counts[i] = count;
        total[i] = a.padded(count);
        earlier[i] -= total[i];  // a group starts its padded length before its end
    }
    __syncthreads();
    if (a.block_m) {
        block_scan<WARPS>(total, e);
        map_blocks(a, total, blockIdx.x * threads + threadIdx.x, gridDim.x * threads);
        if (blockIdx.x == 0 && threadIdx.x == 0) *a.num_padded = total[e - 1];
    }
    const int steps = a.chunk / threads;
    const Ranks r = rank_slots(a, blockIdx.x * a.chunk, steps, before, own);
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
        const int slot = slot_of(blockIdx.x * a.chunk, steps, j), local = r.local[j];
        if (slot >= last_of(a, blockIdx.x * a.chunk, steps)) continue;
        const int position = local >= 0 ? earlier[local] + before[warp * e + local] + r.rank[j] : 0;
        if (!a.block_m) a.target[slot] = batched_row(a, local, position);
        else if (local >= 0) a.target[total[local] + position] = slot;
    }
}

template <int NUM_WARPS, int EACH> cudaError_t launch_small(const Align& a, cudaStream_t stream) {
    const int e = a.slots.num_local, own = max(1, static_cast<int>(ceil_div(e, BLOCKS)));
    const unsigned blocks = static_cast<unsigned>(max(1LL, ceil_div(e, own)));
    align_small_kernel<NUM_WARPS, EACH><<<blocks, NUM_WARPS * WARP, (2 * e + own * NUM_WARPS) * sizeof(int), stream>>>(a, own);
    return cudaGetLastError();
}

}  // namespace moeproof

// Slots of a block in the two-launch form; 0 where one launch does it all. The caller allocates (ceil(S / chunk), e) bins.
extern "C" int moeproof_align_chunk(int num_slots) {
    using namespace moeproof;
    if (num_slots <= SMALL) return 0;
    const int block = WARPS * WARP;
    const long long steps = ceil_div(num_slots, static_cast<long long>(BLOCKS) * block);
    return static_cast<int>(steps < STEPS ? steps : STEPS) * block;
}

extern "C" int moeproof_align(int num_slots, int block_m, int capacity, int P, int B, int* target, int* block_expert,
                              int* num_padded, int* counts, int* histogram, int chunk, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Align a{SLOT_VALUES, num_slots, block_m, capacity, P, B, target, block_expert, num_padded, counts, histogram, chunk};
    if (chunk == 0) {
        if (num_slots <= FEW_WARPS * WARP) return launch_small<FEW_WARPS, 1>(a, stream);
        if (num_slots <= 4 * FEW_WARPS * WARP) return launch_small<FEW_WARPS, 4>(a, stream);
        if (num_slots <= SMALL / 4) return launch_small<WARPS, SMALL_STEPS / 4>(a, stream);
        if (num_slots <= SMALL / 2) return launch_small<WARPS, SMALL_STEPS / 2>(a, stream);
        return launch_small<WARPS, SMALL_STEPS>(a, stream);
    }
    const unsigned blocks = static_cast<unsigned>(ceil_div(num_slots, chunk));
    align_count_kernel<<<blocks, WARPS * WARP, num_local * sizeof(int), stream>>>(a);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const size_t bytes = (3 * sizeof(int) + WARPS * sizeof(uint16_t)) * num_local;
    align_place_kernel<<<blocks, WARPS * WARP, bytes, stream>>>(a);
    return cudaGetLastError();
}
