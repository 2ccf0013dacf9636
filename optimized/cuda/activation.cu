// ACT: the whole activation vocabulary in float32, one rounding. Dead rows are neither read nor written.
//
// A thread makes one pack of the result from a pack of gates and a pack of ups: halves of a row, or pairs side by side.
// Bound by bytes: every element is read or written once.

#include "elementary.cuh"
#include "slots.cuh"

namespace moeproof {

constexpr int THREADS = 256;

// Codes that activation.py sends for a name. Ungated ones come last.
enum Kind : int { SILU, GELU, GELU_TANH, SWIGLUOAI, SWIGLUSTEP, SITU, SILU_NO_MUL, GELU_NO_MUL, GELU_TANH_NO_MUL, RELU_NO_MUL, RELU2_NO_MUL };

struct Activate {
    const void* x;  // (R, N)
    void* h;        // (R, I)
    long long stride_xr, stride_xn, stride_hr, stride_hi;
    long long R;
    int I, kind, interleaved;
    float alpha, beta, limit, linear_beta;
    const int* counts;  // (e,): rows in use of each region of `region` rows; null = all
    long long region;
    Slots slots;  // ids null = every row is live; otherwise row = slot

    __device__ bool live(long long row) const {
        if (slots.ids != nullptr) return slots.local(row) >= 0;
        return counts == nullptr || row % region < counts[row / region];
    }
};

// min(x, limit) and max(-limit, min(x, limit)) that let NaN through.
__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ inline float within(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

// KIND is a compile-time choice, so that the switch is taken once for a pack and not once for an element.
template <int KIND> __device__ float activate(float g, float u, const Activate& a) {
    if (KIND == SILU) {
        if (a.limit > 0.0f) {
            g = at_most(g, a.limit);  // from above only
            u = within(u, a.limit);
        }
        return g * sigmoid(g) * u;
    }
    if (KIND == GELU) return gelu(g) * u;
    if (KIND == GELU_TANH) return gelu_tanh(g) * u;
    if (KIND == SWIGLUOAI) {
        g = at_most(g, a.limit);
        return g * sigmoid(a.alpha * g) * (within(u, a.limit) + a.beta);
    }
    if (KIND == SWIGLUSTEP) return at_most(g * sigmoid(g), a.limit) * within(u, a.limit);
    if (KIND == SITU) {
        if (a.linear_beta > 0.0f) u = a.linear_beta * tanhf(u / a.linear_beta);
        return a.beta * tanhf(g / a.beta) * sigmoid(g) * u;
    }
    if (KIND == SILU_NO_MUL) return g * sigmoid(g);
    if (KIND == GELU_NO_MUL) return gelu(g);
    if (KIND == GELU_TANH_NO_MUL) return gelu_tanh(g);
    const float positive = g < 0.0f ? 0.0f : g;
    return KIND == RELU_NO_MUL ? positive : positive * positive;
}

template <typename T, int N> struct Columns {
    Pack<T, N> gate, up;
};

template <typename T, int N> __device__ Columns<T, N> load_columns(const Activate& a, long long row, int i, int count) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_xr;
    const long long step = N == 1 ? a.stride_xn : 1;
    Columns<T, N> c;
    if (a.kind >= SILU_NO_MUL) {
        c.gate = c.up = load<T, N>(x + i * step, count);
    } else if (!a.interleaved) {
        c.gate = load<T, N>(x + i * step, count);
        c.up = load<T, N>(x + (static_cast<long long>(a.I) + i) * step, count);
    } else if (N == 1) {
        c.gate = load<T, N>(x + 2LL * i * step, 1);
        c.up = load<T, N>(x + (2LL * i + 1) * step, 1);
    } else {
        const Pack<T, N> low = load<T, N>(x + 2LL * i, min(N, 2 * count));
        const Pack<T, N> high = 2 * count > N ? load<T, N>(x + 2LL * i + N, 2 * count - N) : low;
#pragma unroll
        for (int j = 0; j < N / 2; ++j) {
            c.gate.at[j] = low.at[2 * j];
            c.up.at[j] = low.at[2 * j + 1];
            c.gate.at[N / 2 + j] = high.at[2 * j];
            c.up.at[N / 2 + j] = high.at[2 * j + 1];
        }
    }
    return c;
}

template <int KIND, typename T, int N> __device__ Pack<T, N> apply(const Columns<T, N>& c, const Activate& a) {
    Pack<T, N> h;
#pragma unroll
    for (int j = 0; j < N; ++j) h.at[j] = narrow<T>(activate<KIND>(widen(c.gate.at[j]), widen(c.up.at[j]), a));
    return h;
}

template <typename T, int N> __global__ void __launch_bounds__(THREADS) activation_kernel(const Activate a) {
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (row >= a.R || i >= a.I || !a.live(row)) return;
    const int count = min(N, a.I - i);
    const Columns<T, N> c = load_columns<T, N>(a, row, i, count);
    Pack<T, N> h;
    switch (a.kind) {
        case SILU: h = apply<SILU>(c, a); break;
        case GELU: h = apply<GELU>(c, a); break;
        case GELU_TANH: h = apply<GELU_TANH>(c, a); break;
        case SWIGLUOAI: h = apply<SWIGLUOAI>(c, a); break;
        case SWIGLUSTEP: h = apply<SWIGLUSTEP>(c, a); break;
        case SITU: h = apply<SITU>(c, a); break;
        case SILU_NO_MUL: h = apply<SILU_NO_MUL>(c, a); break;
        case GELU_NO_MUL: h = apply<GELU_NO_MUL>(c, a); break;
        case GELU_TANH_NO_MUL: h = apply<GELU_TANH_NO_MUL>(c, a); break;
        case RELU_NO_MUL: h = apply<RELU_NO_MUL>(c, a); break;
        default: h = apply<RELU2_NO_MUL>(c, a); break;
    }
    store<T, N>(static_cast<T*>(a.h) + row * a.stride_hr + (N == 1 ? i * a.stride_hi : i), count, h);
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
    float linear_beta, const int* counts, long long region, long long stride_xr, long long stride_xn, long long stride_hr,
    long long stride_hi, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Activate a{x,     h,    stride_xr, stride_xn, stride_hr,   stride_hi, R,      I,          kind, interleaved,
                     alpha, beta, limit,     linear_beta, counts, region,    SLOT_VALUES};
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        // The ups of packed halves start I elements into the row.
        const bool halves = kind < SILU_NO_MUL && !interleaved;
        const bool wide = packs<E>(x, stride_xr, stride_xn) && packs<E>(h, stride_hr, stride_hi) &&
                          (!halves || I % PER_PACK<E> == 0);
        return wide ? launch<E, PER_PACK<E>>(a, stream) : launch<E, 1>(a, stream);
    });
}
