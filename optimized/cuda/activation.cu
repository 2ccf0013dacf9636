// ACT: the whole activation vocabulary in float32, one rounding. Dead rows are neither read nor written.
//
// A thread makes one pack of the result from a pack of gates and a pack of ups: halves of a row, or pairs side by side.
// Bound by bytes: every element is read or written once.

#include "activation.cuh"

namespace moeproof {

constexpr int THREADS = 256;

template <typename T, int N> __global__ void __launch_bounds__(THREADS) activation_kernel(const Activate a) {
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (row >= a.R || i >= a.I || !a.live(row)) return;
    const Pack<T, N> h = activate<T, N>(load_columns<T, N>(a, row, i), a);
    store<T, N>(static_cast<T*>(a.h) + row * a.stride_hr + (N == 1 ? i * a.stride_hi : i), h);
}

template <typename T, int N> cudaError_t launch(const Activate& a, cudaStream_t stream) {
    const int x = pow2_at_least(ceil_div(a.I, N), THREADS);
    const int y = min(THREADS / x, pow2_at_least(a.R, THREADS));
    const dim3 grid(static_cast<unsigned>(ceil_div(a.R, y)), static_cast<unsigned>(ceil_div(ceil_div(a.I, N), x)));
    activation_kernel<T, N><<<grid, dim3(x, y), 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace moeproof

extern "C" int moeproof_activate(
    int dtype, const void* x, void* h, long long R, int I, int kind, int interleaved, float alpha, float beta, float limit,
    float linear_beta, const int* counts, unsigned region, long long stride_xr, long long stride_xn, long long stride_hr,
    long long stride_hi, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Activate a{x,     h,    stride_xr, stride_xn, stride_hr,   stride_hi, R,      I,          kind, interleaved,
                     alpha, beta, limit,     linear_beta, counts, region,    SLOT_VALUES};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        const bool wide = packs<E>(x, I, stride_xr, stride_xn) && packs<E>(h, I, stride_hr, stride_hi);
        return wide ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}
