// Rows between canonical order (by token or slot) and the order of an alignment (by expert, padded to blocks), for a grouped
// product that wants each expert's rows side by side.

#include "scan.cuh"

namespace moeproof {

constexpr int THREADS = 256;
constexpr int ENDS_WARPS = 8;

struct Rows {
    const void* source;
    void* target;
    long long stride_sr, stride_sh, stride_tr, stride_th;
    const int* sorted_slots;  // (P,): num_slots in padding
    const int* num_padded;    // (1,): rows in use
    int P, H, num_slots;
    unsigned slots_per_row;  // gather: row of `source` = slot / slots_per_row
    int scatter;             // 0: target[p] = source[slot / slots_per_row], zeros in padding. 1: target[slot] = source[p]
};

template <typename T, int N> __global__ void __launch_bounds__(THREADS) rows_kernel(const Rows a) {
    const int p = blockIdx.x * blockDim.y + threadIdx.y;
    const int h = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (p >= a.P || h >= a.H || p >= *a.num_padded) return;
    const int slot = a.sorted_slots[p];
    const bool padding = slot >= a.num_slots;
    if (padding && a.scatter) return;
    const long long from = a.scatter ? p : static_cast<unsigned>(slot) / a.slots_per_row, to = a.scatter ? slot : p;
    Pack<T, N> x = {};
    if (!padding) {
        x = load<T, N>(static_cast<const T*>(a.source) + from * a.stride_sr + (N == 1 ? h * a.stride_sh : h));
    }
    store<T, N>(static_cast<T*>(a.target) + to * a.stride_tr + (N == 1 ? h * a.stride_th : h), x);
}

template <typename T, int N> cudaError_t launch(const Rows& a, cudaStream_t stream) {
    const int x = pow2_at_least(ceil_div(a.H, N), THREADS);
    const int y = THREADS / x;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.P, y)), static_cast<unsigned>(ceil_div(ceil_div(a.H, N), x)));
    rows_kernel<T, N><<<grid, dim3(x, y), 0, stream>>>(a);
    return cudaGetLastError();
}

// ends[i] = rows, padded, of experts 0..i.
__global__ void __launch_bounds__(ENDS_WARPS* WARP) ends_kernel(const int* counts, int e, int block_m, int* ends) {
    for (int i = threadIdx.x; i < e; i += ENDS_WARPS * WARP) ends[i] = round_up(counts[i], block_m);
    __syncthreads();
    block_scan<ENDS_WARPS>(ends, e);
}

}  // namespace moeproof

extern "C" int moeproof_rows(
    int dtype, const void* source, void* target, int P, int H, int num_slots, unsigned slots_per_row, int scatter,
    const int* sorted_slots, const int* num_padded, long long stride_sr, long long stride_sh, long long stride_tr,
    long long stride_th, cudaStream_t stream) {
    using namespace moeproof;
    const Rows a{source, target, stride_sr, stride_sh, stride_tr,     stride_th, sorted_slots,
                 num_padded, P,  H,         num_slots, slots_per_row, scatter};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        const bool wide = packs<E>(source, H, stride_sr, stride_sh) && packs<E>(target, H, stride_tr, stride_th);
        return wide ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}

extern "C" int moeproof_ends(const int* counts, int e, int block_m, int* ends, cudaStream_t stream) {
    using namespace moeproof;
    ends_kernel<<<1, ENDS_WARPS * WARP, 0, stream>>>(counts, e, block_m, ends);
    return cudaGetLastError();
}
