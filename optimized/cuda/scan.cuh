// Prefix sums: of a warp, of a block.
#pragma once

#include "stage.cuh"

namespace moeproof {

__device__ inline int round_up(int count, int to) { return (count + to - 1) / to * to; }

// Inclusive prefix sum over a warp.
__device__ inline int warp_scan(int x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        const int before = __shfl_up_sync(ALL, x, d);
        if (lane >= d) x += before;
    }
    return x;
}

// values[i] = sum of values[0..i], in place, by a whole block. Each thread owns a run of neighbours.
template <int NUM_WARPS> __device__ void block_scan(int* values, int n) {
    __shared__ int sums[NUM_WARPS];
    const int run = (n + NUM_WARPS * WARP - 1) / (NUM_WARPS * WARP);
    const int first = min(static_cast<int>(threadIdx.x) * run, n), last = min(first + run, n);
    int sum = 0;
    for (int i = first; i < last; ++i) sum += values[i];
    const int upto = warp_scan(sum);
    if (threadIdx.x % WARP == WARP - 1) sums[threadIdx.x / WARP] = upto;
    __syncthreads();
    if (threadIdx.x < WARP) {
        const int own = threadIdx.x < NUM_WARPS ? sums[threadIdx.x] : 0;
        const int scanned = warp_scan(own);
        if (threadIdx.x < NUM_WARPS) sums[threadIdx.x] = scanned - own;
    }
    __syncthreads();
    int total = sums[threadIdx.x / WARP] + upto - sum;
    for (int i = first; i < last; ++i) values[i] = total += values[i];
    __syncthreads();
}

}  // namespace moeproof
