// COMBINE: weigh and sum a token's slots in float32, scale, add identity and shared terms, round once.
//
// A block holds `blockDim.y` tokens side by side; a thread owns one pack of columns and walks over the token's slots in
// order, so that the sum is the same whatever else is in the batch. Bound by the bytes of y: each is read once, in 16-byte
// packs, eight slots ahead. A warp serves one token: each lane looks up a slot for all, and nobody waits at a barrier.

#include "elementary.cuh"
#include "slots.cuh"

namespace moeproof {

constexpr int THREADS = 128;
constexpr int AHEAD = 8;
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
    unsigned T;
    int H, weighted, num_zero;
    float scale;

    // Row of y, DEAD or IDENTITY. Weight and row of a dead slot may hold anything.
    __device__ int row_of(unsigned t, int k) const {
        const long long id = slots.id(slots.raw_at(t * slots.stride_t + k * slots.stride_k));
        const int slot = static_cast<int>(t * slots.K + k);
        if (num_zero && id >= slots.num_experts && id < slots.num_experts + num_zero) return IDENTITY;
        if (rows != nullptr) return id >= 0 ? max(rows[slot], DEAD) : DEAD;
        return slots.local_of(id) >= 0 ? slot : DEAD;
    }
};

template <typename T, int N> __global__ void __launch_bounds__(THREADS) combine_kernel(const Combine a) {
    const unsigned t = blockIdx.x * blockDim.y + threadIdx.y;  // slots, and so tokens, number fewer than 2^31
    if (t >= a.T) return;  // whole warps leave; lanes beside the last column stay, and look up
    const int h = (blockIdx.y * blockDim.x + threadIdx.x) * N, K = a.slots.K, lane = threadIdx.x % WARP;
    // Packs are only used where neighbours are 1 apart.
    const char* y = reinterpret_cast<const char*>(static_cast<const T*>(a.y) + (N == 1 ? h * a.stride_yh : h));
    // Of packs in 32 bits, so that a row is found in one instruction.
    using Pitch = std::conditional_t<N == 1, uint64_t, unsigned>;
    const auto pitch = static_cast<Pitch>(a.stride_ys * sizeof(T));
    float acc[N] = {};
    float identity = 0.0f;
    for (int base = 0; base < K; base += WARP) {
        int row = DEAD;
        float weight = 1.0f;
        if (const int k = base + lane; k < K) {
            // Loaded beside the id and not behind it; what stands there for a dead slot is thrown away.
            const float w = a.weights[t * a.stride_wt + k * a.stride_wk];
            row = a.row_of(t, k);
            if (row == IDENTITY) identity += w;
            if (a.weighted) weight = w;
        }
        for (int first = 0; first < WARP && base + first < K; first += AHEAD) {
            Pack<T, N> ahead[AHEAD];
            int at[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                at[j] = __shfl_sync(ALL, row, first + j);
                const char* from = y + static_cast<uint64_t>(static_cast<unsigned>(at[j])) * pitch;
                if (at[j] >= 0 && h < a.H) ahead[j] = load<T, N>(reinterpret_cast<const T*>(from));
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const float w = __shfl_sync(ALL, weight, first + j);
                if (at[j] < 0) continue;
#pragma unroll
                for (int i = 0; i < N; ++i) acc[i] += w * ahead[j].get(i);
            }
        }
    }
    if (a.num_zero) {
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) identity += __shfl_xor_sync(ALL, identity, d);
    }
    if (h >= a.H) return;
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
        if (a.shared != nullptr) acc[i] += factor * a.shared[static_cast<long long>(t) * a.H + h + i];
    }
    store<T, N>(static_cast<T*>(a.out) + t * a.stride_ot + (N == 1 ? h * a.stride_oh : h), pack<T, N>(acc));
}

template <typename T, int N> cudaError_t launch(const Combine& a, cudaStream_t stream) {
    const long long packs = ceil_div(a.H, N);
    const int threads = spread(a.T * packs, THREADS);
    const int x = max(WARP, pow2_at_least(packs, threads)), y = min(threads / x, pow2_at_least(a.T, threads));
    const dim3 grid(static_cast<unsigned>(ceil_div(a.T, y)), static_cast<unsigned>(ceil_div(packs, x)));
    combine_kernel<T, N><<<grid, dim3(x, y), 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace moeproof

extern "C" int moeproof_combine(
    int dtype, const void* y, const float* weights, const int* rows, const void* x, const float* shared, const float* gate,
    void* out, unsigned T, int H, float scale, int weighted, int num_zero, long long stride_ys, long long stride_yh,
    long long stride_wt, long long stride_wk, long long stride_xt, long long stride_xh, long long stride_ot,
    long long stride_oh, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Combine a{SLOT_VALUES, weights,   stride_wt, stride_wk, rows,      y, x, shared,   gate,     out,  stride_ys,
                    stride_yh,   stride_xt, stride_xh, stride_ot, stride_oh, T, H, weighted, num_zero, scale};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        const bool wide = packs<E>(y, H, stride_ys, stride_yh) && packs<E>(out, H, stride_ot, stride_oh) &&
                          (num_zero == 0 || packs<E>(x, H, stride_xt, stride_xh)) &&
                          static_cast<uint64_t>(stride_ys) * sizeof(E) < 1ULL << 32;
        return wide ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}
