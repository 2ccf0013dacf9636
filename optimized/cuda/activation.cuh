// The activation vocabulary as device code: a pack of results from packs of gates and ups.
#pragma once

#include "elementary.cuh"
#include "slots.cuh"

namespace moeproof {

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
    unsigned region;
    Slots slots;  // ids null = every row is live; otherwise row = slot

    __device__ bool live(long long row) const {
        if (slots.ids != nullptr) return slots.local(row) >= 0;
        if (counts == nullptr) return true;
        const unsigned r = static_cast<unsigned>(row);  // regions number rows below 2^31 (activation.py)
        return static_cast<int>(r % region) < counts[r / region];
    }
};

// min(x, limit) and max(-limit, min(x, limit)) that let NaN through.
__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ inline float within(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

// KIND is a compile-time choice, so that the switch is taken once for a pack and not once for an element.
constexpr int LIMITED_SILU = -1;
template <int KIND> __device__ float activate(float g, float u, const Activate& a) {
    if (KIND == LIMITED_SILU) {
        g = at_most(g, a.limit);  // from above only
        u = within(u, a.limit);
    }
    if (KIND == SILU || KIND == LIMITED_SILU) return g * sigmoid(g) * u;
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

// What N results are made of: N gates and N ups, or, where those stand side by side, 2 N columns in their order.
template <typename T, int N> struct Columns {
    Pack<T, N> first, second;
};

// Of N results from i on. N = 1 takes any strides.
template <typename T, int N> __device__ Columns<T, N> load_columns(const Activate& a, long long row, int i) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_xr;
    const long long step = N == 1 ? a.stride_xn : 1;
    const bool pairs = a.kind < SILU_NO_MUL && a.interleaved;
    Columns<T, N> c = {};
    c.first = load<T, N>(x + (pairs ? 2LL * i : i) * step);
    if (pairs) c.second = load<T, N>(x + (2LL * i + N) * step);
    else if (a.kind < SILU_NO_MUL) c.second = load<T, N>(x + (static_cast<long long>(a.I) + i) * step);
    return c;
}

// `count` of them, one by one: for rows that are not whole packs.
template <typename T, int N> __device__ Columns<T, N> load_loose_columns(const Activate& a, long long row, int i, int count) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_xr;
    const bool gated = a.kind < SILU_NO_MUL, pairs = gated && a.interleaved;
    Columns<T, N> c = {};
#pragma unroll
    for (int j = 0; j < 2 * N; ++j) {
        // Column j of a pair of packs: of gates and then ups, or of both side by side.
        const int column = pairs ? 2 * i + j : j < N ? i + j : a.I + i + j - N;
        const bool there = pairs ? j < 2 * count : j % N < count && (gated || j < N);
        const unsigned bits = there ? bits_of(x[column * a.stride_xn]) : 0u;
        constexpr int PER_WORD = Pack<T, N>::PER_WORD;
        (j < N ? c.first : c.second).words[j % N / PER_WORD] |= bits << (j % N % PER_WORD * 8 * sizeof(T));
    }
    return c;
}

// PAIRED: whether gates and ups may stand side by side.
template <int KIND, bool PAIRED, typename T, int N> __device__ Pack<T, N> apply(const Columns<T, N>& c, const Activate& a) {
    float h[N];
    if (PAIRED && KIND < SILU_NO_MUL && N > 1 && a.interleaved) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const Pack<T, N>& side = 2 * j < N ? c.first : c.second;
            h[j] = activate<KIND>(side.get(2 * j % N), side.get((2 * j + 1) % N), a);
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) h[j] = activate<KIND>(c.first.get(j), c.second.get(j), a);
    }
    return pack<T, N>(h);
}

template <typename T, int N> __device__ Pack<T, N> activate(const Columns<T, N>& c, const Activate& a) {
    switch (a.kind) {
        case SILU: return a.limit > 0.0f ? apply<LIMITED_SILU, true>(c, a) : apply<SILU, true>(c, a);
        case GELU: return apply<GELU, true>(c, a);
        case GELU_TANH: return apply<GELU_TANH, true>(c, a);
        case SWIGLUOAI: return apply<SWIGLUOAI, true>(c, a);
        case SWIGLUSTEP: return apply<SWIGLUSTEP, true>(c, a);
        case SITU: return apply<SITU, true>(c, a);
        case SILU_NO_MUL: return apply<SILU_NO_MUL, true>(c, a);
        case GELU_NO_MUL: return apply<GELU_NO_MUL, true>(c, a);
        case GELU_TANH_NO_MUL: return apply<GELU_TANH_NO_MUL, true>(c, a);
        case RELU_NO_MUL: return apply<RELU_NO_MUL, true>(c, a);
        default: return apply<RELU2_NO_MUL, true>(c, a);
    }
}

}  // namespace moeproof
