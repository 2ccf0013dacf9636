// DISPATCH on one rank: each slot's row to its place, weighed where the weight is on the input; and zeros for dead slots.
//
// A thread reads one pack of a token's row and writes it for each of the token's slots: bound by the bytes that are written.

#include "slots.cuh"

namespace moeproof {

constexpr int THREADS = 256;
constexpr int AHEAD = 8;  // slots whose places are looked up together

struct Move {
    const void* x;         // (T, H)
    const float* weights;  // (T, K); null: rows are moved as they are
    const int* rows;       // (S,): row of each slot in `out`, -1 = leave out; null: row = slot
    void* out;             // (rows, H)
    long long stride_xt, stride_xh, stride_wt, stride_wk, stride_or, stride_oh;
    unsigned T;
    int H, K;
};

// x w as a float32 that rounds to T as the exact product does: where T is narrower, inexact ones take their odd neighbour, so
// that the second rounding sees on which side the product lay.
template <typename T> __device__ float product(float x, float w) {
    if (sizeof(T) == sizeof(float)) return __fmul_rn(x, w);
    const double exact = static_cast<double>(x) * static_cast<double>(w);
    const float near = static_cast<float>(exact);
    const double wide = static_cast<double>(near);
    unsigned bits = __float_as_uint(near);
    if (wide != exact && bits % 2 == 0 && fabsf(near) < INFINITY) bits += fabs(wide) > fabs(exact) ? ~0u : 1u;
    return __uint_as_float(bits);
}

template <typename T, int N> __global__ void __launch_bounds__(THREADS) move_kernel(const Move a) {
    const unsigned t = blockIdx.x * blockDim.y + threadIdx.y;
    const int h = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (t >= a.T || h >= a.H) return;
    const Pack<T, N> x = load<T, N>(static_cast<const T*>(a.x) + t * a.stride_xt + (N == 1 ? h * a.stride_xh : h));
    T* out = static_cast<T*>(a.out) + (N == 1 ? h * a.stride_oh : h);
    for (int first = 0; first < a.K; first += AHEAD) {
        int row[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const unsigned slot = t * a.K + first + j;
            row[j] = -1;
            if (first + j < a.K) row[j] = a.rows != nullptr ? a.rows[slot] : static_cast<int>(slot);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (row[j] < 0) continue;
            Pack<T, N> moved = x;
            if (a.weights != nullptr) {
                const float w = a.weights[t * a.stride_wt + (first + j) * a.stride_wk];
                float weighed[N];
#pragma unroll
                for (int i = 0; i < N; ++i) weighed[i] = product<T>(x.get(i), w);
                moved = pack<T, N>(weighed);
            }
            store<T, N>(out + row[j] * a.stride_or, moved);
        }
    }
}

struct Clear {
    Slots slots;
    void* y;  // (S, H)
    long long stride_ys, stride_yh;
    int S, H;
};

template <typename T, int N> __global__ void __launch_bounds__(THREADS) clear_kernel(const Clear a) {
    const int slot = blockIdx.x * blockDim.y + threadIdx.y;
    const int h = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (slot >= a.S || h >= a.H || a.slots.local(slot) >= 0) return;
    T* at = static_cast<T*>(a.y) + slot * a.stride_ys + (N == 1 ? h * a.stride_yh : h);
    store<T, N>(at, Pack<T, N>{});
}

struct Shape {
    dim3 grid, block;
};

// A thread for each pack of `columns`, as many rows to a block as fit.
inline Shape shape_of(long long rows, int columns, int pack) {
    const long long packs = ceil_div(columns, pack);
    const int threads = spread(rows * packs, THREADS), x = pow2_at_least(packs, threads), y = threads / x;
    return {dim3(static_cast<unsigned>(ceil_div(rows, y)), static_cast<unsigned>(ceil_div(packs, x))), dim3(x, y)};
}

template <typename T, int N> cudaError_t launch(const Move& a, cudaStream_t stream) {
    const Shape s = shape_of(a.T, a.H, N);
    move_kernel<T, N><<<s.grid, s.block, 0, stream>>>(a);
    return cudaGetLastError();
}

template <typename T, int N> cudaError_t launch(const Clear& a, cudaStream_t stream) {
    const Shape s = shape_of(a.S, a.H, N);
    clear_kernel<T, N><<<s.grid, s.block, 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace moeproof

extern "C" int moeproof_move(
    int dtype, const void* x, const float* weights, const int* rows, void* out, unsigned T, int H, int K, long long stride_xt,
    long long stride_xh, long long stride_wt, long long stride_wk, long long stride_or, long long stride_oh,
    cudaStream_t stream) {
    using namespace moeproof;
    const Move a{x, weights, rows, out, stride_xt, stride_xh, stride_wt, stride_wk, stride_or, stride_oh, T, H, K};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        const bool wide = packs<E>(x, H, stride_xt, stride_xh) && packs<E>(out, H, stride_or, stride_oh);
        return wide ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}

extern "C" int moeproof_clear(
    int dtype, void* y, int S, int H, long long stride_ys, long long stride_yh, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Clear a{SLOT_VALUES, y, stride_ys, stride_yh, S, H};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        return packs<E>(y, H, stride_ys, stride_yh) ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}
