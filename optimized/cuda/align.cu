// PERMUTE: a stable counting sort of slots by local expert, with each expert's group padded to whole blocks.
//
// Ranks inside a warp come from matching lanes, between warps from a table in shared memory, between blocks from histograms
// in device memory. Slots are taken in ascending order throughout, so an expert's slots stay in order and no result depends
// on timing. Few slots: one block does it all, in one launch. More: one launch counts, a second places.

#include "scan.cuh"
#include "slots.cuh"

namespace moeproof {

constexpr int STEPS = 8;  // slots of a thread
constexpr int SMALL_WARPS = 32;
constexpr int WARPS = 16;
constexpr int SMALL = SMALL_WARPS * WARP * STEPS;  // slots that one block sorts alone
constexpr size_t SMALL_BYTES = 96 * 1024;          // of shared memory, at most; below sm_89's limit of 99 KiB

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

// Ranks of this block's slots; before[warp][expert] becomes the count of slots in earlier warps, total[expert] of all.
template <int NUM_WARPS>
__device__ Ranks rank_slots(const Align& a, int first, int steps, uint16_t* before, int* total) {
    const int e = a.slots.num_local;
    for (int i = threadIdx.x; i < NUM_WARPS * e; i += NUM_WARPS * WARP) before[i] = 0;
    Ranks r;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
        const int slot = slot_of(first, steps, j);
        r.local[j] = j < steps && slot < a.num_slots ? a.slots.local(slot) : -1;
    }
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
    for (int i = threadIdx.x; i < e; i += NUM_WARPS * WARP) {
        int sum = 0;
#pragma unroll
        for (int w = 0; w < NUM_WARPS; ++w) {
            const int count = before[w * e + i];
            before[w * e + i] = static_cast<uint16_t>(sum);
            sum += count;
        }
        total[i] = sum;
    }
    __syncthreads();
    return r;
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

__device__ inline int batched_row(const Align& a, int local, int position) {
    return local >= 0 && position < a.capacity ? local * a.capacity + position : -1;
}

// All in one block. Rows are sorted in shared memory and written out in order.
__global__ void __launch_bounds__(SMALL_WARPS* WARP) align_small_kernel(const Align a) {
    extern __shared__ int memory[];
    const int e = a.slots.num_local, threads = SMALL_WARPS * WARP;
    int* end = memory;
    int* count = end + e;
    uint16_t* before = reinterpret_cast<uint16_t*>(count + e);
    uint16_t* sorted = before + SMALL_WARPS * e;
    const int steps = static_cast<int>(ceil_div(a.num_slots, threads));
    if (a.block_m)
        for (int p = threadIdx.x; p < a.P; p += threads) sorted[p] = static_cast<uint16_t>(a.num_slots);
    const Ranks r = rank_slots<SMALL_WARPS>(a, 0, steps, before, count);
    for (int i = threadIdx.x; i < e; i += threads) {
        a.counts[i] = count[i];
        end[i] = a.padded(count[i]);
    }
    __syncthreads();
    if (a.block_m) block_scan<SMALL_WARPS>(end, e);
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
        const int slot = slot_of(0, steps, j), local = r.local[j];
        if (j >= steps || slot >= a.num_slots) continue;
        const int position = local >= 0 ? before[threadIdx.x / WARP * e + local] + r.rank[j] : 0;
        if (!a.block_m) a.target[slot] = batched_row(a, local, position);
        else if (local >= 0) sorted[end[local] - a.padded(count[local]) + position] = static_cast<uint16_t>(slot);
    }
    if (!a.block_m) return;
    __syncthreads();
    for (int p = threadIdx.x; p < a.P; p += threads) a.target[p] = sorted[p];
    map_blocks(a, end, threadIdx.x, threads);
    if (threadIdx.x == 0) *a.num_padded = end[e - 1];
}

// First of two launches: histogram[block][expert], and padding laid down everywhere.
__global__ void __launch_bounds__(WARPS* WARP) align_count_kernel(const Align a) {
    extern __shared__ int bins[];
    const int e = a.slots.num_local, threads = WARPS * WARP;
    for (int i = threadIdx.x; i < e; i += threads) bins[i] = 0;
    __syncthreads();
    const int first = blockIdx.x * a.chunk, last = min(first + a.chunk, a.num_slots);
    for (int slot = first + static_cast<int>(threadIdx.x); slot < last; slot += threads) {
        const int local = a.slots.local(slot);
        if (local >= 0) atomicAdd(bins + local, 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < e; i += threads) a.histogram[static_cast<long long>(blockIdx.x) * e + i] = bins[i];
    if (a.block_m)
        for (int p = blockIdx.x * threads + threadIdx.x; p < a.P; p += gridDim.x * threads) a.target[p] = a.num_slots;
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
    const Ranks r = rank_slots<WARPS>(a, blockIdx.x * a.chunk, steps, before, own);
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
        const int slot = slot_of(blockIdx.x * a.chunk, steps, j), local = r.local[j];
        if (j >= steps || slot >= a.num_slots) continue;
        const int position = local >= 0 ? earlier[local] + before[warp * e + local] + r.rank[j] : 0;
        if (!a.block_m) a.target[slot] = batched_row(a, local, position);
        else if (local >= 0) a.target[total[local] + position] = slot;
    }
}

}  // namespace moeproof

// Slots of a block in the two-launch form; 0 where one block does it all. The caller allocates (ceil(S / chunk), e) bins.
extern "C" int moeproof_align_chunk(int num_slots, int num_local, int P) {
    using namespace moeproof;
    const size_t bytes = (2 * sizeof(int) + SMALL_WARPS * sizeof(uint16_t)) * num_local + sizeof(uint16_t) * P;
    if (num_slots <= SMALL && bytes <= SMALL_BYTES) return 0;
    const int block = WARPS * WARP;
    const long long steps = ceil_div(num_slots, 128LL * block);  // about a block for each multiprocessor
    return static_cast<int>(steps < STEPS ? steps : STEPS) * block;
}

extern "C" int moeproof_align(int num_slots, int block_m, int capacity, int P, int B, int* target, int* block_expert,
                              int* num_padded, int* counts, int* histogram, int chunk, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Align a{SLOT_VALUES, num_slots, block_m, capacity, P, B, target, block_expert, num_padded, counts, histogram, chunk};
    if (chunk == 0) {
        const size_t bytes = (2 * sizeof(int) + SMALL_WARPS * sizeof(uint16_t)) * num_local + sizeof(uint16_t) * P;
        if (bytes > 48 * 1024) {
            const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
            const cudaError_t error = cudaFuncSetAttribute(align_small_kernel, most, static_cast<int>(SMALL_BYTES));
            if (error != cudaSuccess) return error;
        }
        align_small_kernel<<<1, SMALL_WARPS * WARP, bytes, stream>>>(a);
        return cudaGetLastError();
    }
    const unsigned blocks = static_cast<unsigned>(ceil_div(num_slots, chunk));
    align_count_kernel<<<blocks, WARPS * WARP, num_local * sizeof(int), stream>>>(a);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const size_t bytes = (3 * sizeof(int) + WARPS * sizeof(uint16_t)) * num_local;
    align_place_kernel<<<blocks, WARPS * WARP, bytes, stream>>>(a);
    return cudaGetLastError();
}
