// COMBINE: weigh and sum a token's slots in float32, scale, add identity and shared terms, round once.
//
// A block holds `blockDim.y` tokens side by side; a thread owns one pack of columns and walks over the token's slots in
// order, so that the sum is the same whatever else is in the batch. Bound by the bytes of y: each is read once, in 16-byte
// packs, eight slots ahead.

#include "elementary.cuh"
#include "slots.cuh"

namespace moeproof {

constexpr int THREADS = 256;
constexpr int AHEAD = 8;
constexpr int MAX_SLOTS = 4096;  // of a block's tokens together: 32 KiB of rows and weights
constexpr int DEAD = -1, IDENTITY = -2;

struct Combine {
    Slots slots;
    const float* weights;  // (T, K)
    long long stride_wt, stride_wk;
    const int* rows;  // (T K,): row of each slot, -1 = dead; null: row = slot
    const void *y, *x;
    const float *shared, *gate;  // (T, H), (T,)
    void* out;
    long long stride_ys, stride_yh, stride_xt, stride_xh, stride_ot, stride_oh;
    long long T;
    int H, weighted, num_zero;
    float scale;

    // Row of y, DEAD or IDENTITY. Weight and row of a dead slot may hold anything.
    __device__ int row_of(long long slot) const {
        const long long id = slots.id(slot);
        if (num_zero && id >= slots.num_experts && id < slots.num_experts + num_zero) return IDENTITY;
        if (rows != nullptr) return id >= 0 ? max(rows[slot], DEAD) : DEAD;
        return slots.local_of(id) >= 0 ? static_cast<int>(slot) : DEAD;
    }
};

template <typename T, int N> __global__ void __launch_bounds__(THREADS) combine_kernel(const Combine a) {
    extern __shared__ int shared_memory[];
    const int K = a.slots.K;
    int* rows = shared_memory + threadIdx.y * K;
    float* weights = reinterpret_cast<float*>(shared_memory + blockDim.y * K) + threadIdx.y * K;
    const long long t = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (t < a.T) {
        for (int k = threadIdx.x; k < K; k += blockDim.x) {
            // Loaded beside the id and not behind it; what stands there for a dead slot is thrown away.
            const float w = a.weights[t * a.stride_wt + k * a.stride_wk];
            const int row = a.row_of(t * K + k);
            rows[k] = row;
            weights[k] = row == IDENTITY || (row >= 0 && a.weighted) ? w : 1.0f;
        }
    }
    __syncthreads();
    const int h = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (t >= a.T || h >= a.H) return;
    // Packs are only used where neighbours are 1 apart.
    const T* y = static_cast<const T*>(a.y) + (N == 1 ? h * a.stride_yh : h);
    float acc[N] = {};
    float identity = 0.0f;
    for (int first = 0; first < K; first += AHEAD) {
        Pack<T, N> ahead[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < K && rows[first + j] >= 0)
                ahead[j] = load<T, N>(y + rows[first + j] * a.stride_ys);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (first + j >= K) break;
            const float w = weights[first + j];
            if (rows[first + j] >= 0) {
#pragma unroll
                for (int i = 0; i < N; ++i) acc[i] += w * ahead[j].get(i);
            } else if (rows[first + j] == IDENTITY) {
                identity += w;
            }
        }
    }
    // A token without identity slots must not turn an infinite input into NaN.
    if (identity != 0.0f) {
        const T* x = static_cast<const T*>(a.x) + t * a.stride_xt + (N == 1 ? h * a.stride_xh : h);
        const Pack<T, N> own = load<T, N>(x);
#pragma unroll
        for (int i = 0; i < N; ++i) acc[i] += identity * own.get(i);
    }
    const float factor = a.gate != nullptr ? sigmoid(a.gate[t]) : 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        acc[i] *= a.scale;
        if (a.shared != nullptr) acc[i] += factor * a.shared[t * a.H + h + i];
    }
    store<T, N>(static_cast<T*>(a.out) + t * a.stride_ot + (N == 1 ? h * a.stride_oh : h), pack<T, N>(acc));
}

template <typename T, int N> cudaError_t launch(const Combine& a, cudaStream_t stream) {
    const int x = pow2_at_least(ceil_div(a.H, N), THREADS);
    // Fewer tokens side by side where their slots would overflow shared memory.
    const int y = max(1, min(min(THREADS / x, pow2_at_least(a.T, THREADS)), MAX_SLOTS / max(static_cast<int>(a.slots.K), 1)));
    const dim3 grid(static_cast<unsigned>(ceil_div(a.T, y)), static_cast<unsigned>(ceil_div(ceil_div(a.H, N), x)));
    combine_kernel<T, N><<<grid, dim3(x, y), 2 * y * a.slots.K * sizeof(int), stream>>>(a);
    return cudaGetLastError();
}

}  // namespace moeproof

extern "C" int moeproof_combine(
    int dtype, const void* y, const float* weights, const int* rows, const void* x, const float* shared, const float* gate,
    void* out, long long T, int H, float scale, int weighted, int num_zero, long long stride_ys, long long stride_yh,
    long long stride_wt, long long stride_wk, long long stride_xt, long long stride_xh, long long stride_ot,
    long long stride_oh, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Combine a{SLOT_VALUES, weights,   stride_wt, stride_wk, rows,      y, x, shared,   gate,     out,  stride_ys,
                    stride_yh,   stride_xt, stride_xh, stride_ot, stride_oh, T, H, weighted, num_zero, scale};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        const bool wide = packs<E>(y, H, stride_ys, stride_yh) && packs<E>(out, H, stride_ot, stride_oh) &&
                          (num_zero == 0 || packs<E>(x, H, stride_xt, stride_xh));
        return wide ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}
