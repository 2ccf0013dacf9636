// QUANT1 and QUANT2, alone or with the activation before it: codes and scales, bit for bit as the scheme table says.
//
// A team of lanes owns a group: it takes the group's amax, makes the scale, divides, clamps and rounds. Groups of a row of up
// to 128 columns fit one warp or less; a whole row takes up to a block, and waits in shared memory for its scale. Every
// step is one float32 operation, rounded to nearest: no contraction, no approximate division.

#include "activation.cuh"
#include "encode.cuh"

namespace moeproof {

constexpr int THREADS = 256;

// Codes that quantise.py sends.
enum Rule : int { AMAX, STATIC, OCP_FLOOR, ROUND_UP };
enum Quotient : int { DIVIDE, RECIPROCAL, INVERSE };

struct Quantise {
    Activate act;  // act.x is the source; act.h, where not null, gets the activation, rounded
    int C, group;  // columns, and columns of a group
    unsigned groups;
    int format, rule, quotient;
    float top, floor;    // largest value of the format; least amax
    int emax, top_bits;  // exponent and mantissa bits of `top`, for ROUND_UP
    const float* given;  // (1,): the static scale
    void* codes;         // (R, C), or (R, C / 2) nibbles
    float* scales;       // (R, groups)
    uint8_t* exponents;  // (R, groups), of e8m0
    int packed;          // sources and codes can be moved in packs
    long long code_bytes;  // of a row
};

// a / b, correctly rounded, from b's correctly rounded reciprocal (Markstein 1990, theorem 8): two fused steps instead of a
// division. Needs b far from the ends of the range; a quotient too small for the remainder to be exact rounds to code 0.
struct Divisor {
    float b, reciprocal;
    bool usual;

    __device__ float divides(float a) const {
        if (!usual) return __fdiv_rn(a, b);
        const float q = __fmul_rn(a, reciprocal);
        // The sign is a's: the sum of a zero quotient and a zero remainder would lose it.
        return copysignf(__fmaf_rn(__fmaf_rn(-q, b, a), reciprocal, q), a);
    }
};

__device__ inline Divisor divisor_of(float b) { return {b, __fdiv_rn(1.0f, b), b > 0x1p-60f && b < 0x1p60f}; }

__device__ inline float two_to(int e) { return __uint_as_float(e > -127 ? static_cast<unsigned>(e + 127) << 23 : 0x00400000u); }

// Exponent of a power-of-two scale, from the bits of amax: no logarithm, which errs next to powers of two. Below 2^-126 any
// amax ends at -127, as zero does.
__device__ inline int scale_exponent(const Quantise& a, float amax) {
    const unsigned bits = __float_as_uint(amax);
    int e = static_cast<int>(bits >> 23) - 127 - a.emax;
    if (a.rule == ROUND_UP && static_cast<int>(bits & 0x7fffffu) > a.top_bits) ++e;
    return max(-127, min(127, e));
}

// Largest over the `lanes` threads of a team; whole warps take part. `across` holds a value for each warp of the block.
__device__ inline float team_max(float x, int lanes, float* across) {
#pragma unroll
    for (int d = 1; d < WARP; d *= 2)
        if (d < lanes) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
    if (lanes <= WARP) return x;
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) across[warp] = x;
    __syncthreads();
    const int first = warp / (lanes / WARP) * (lanes / WARP);
    for (int w = 0; w < lanes / WARP; ++w) x = fmaxf(x, across[first + w]);
    return x;
}

// Columns i..i+count of a row: what is quantised.
template <bool ACTIVATED, typename T, int N> __device__ Pack<T, N> source(const Quantise& a, long long row, int i, int count) {
    const Activate& act = a.act;
    if constexpr (ACTIVATED) {
        const Columns<T, N> c = a.packed ? load_columns<T, N>(act, row, i, count) : load_loose_columns<T, N>(act, row, i, count);
        return activate<T, N>(c, act);
    }
    const T* x = static_cast<const T*>(act.x) + row * act.stride_xr;
    if (a.packed) return load<T, N>(x + i, count);
    Pack<T, N> all;
#pragma unroll
    for (int j = 0; j < N; ++j) all.at[j] = j < count ? x[(i + j) * act.stride_xn] : narrow<T>(0.0f);
    return all;
}

template <typename T, int N> __device__ void store_h(const Quantise& a, long long row, int i, int count, const Pack<T, N>& h) {
    T* to = static_cast<T*>(a.act.h) + row * a.act.stride_hr;
    if (a.packed) return store<T, N>(to + i, count, h);
#pragma unroll
    for (int j = 0; j < N; ++j)
        if (j < count) to[(i + j) * a.act.stride_hi] = h.at[j];
}

template <int FORMAT, int N> __device__ void store_codes(const Quantise& a, long long row, int i, int count, const float (&x)[N]) {
    const Codes<N> codes = encode_all<FORMAT, N>(x);
    constexpr int PER_BYTE = FORMAT == E2M1 ? 2 : 1, BYTES = N / PER_BYTE;
    uint8_t* to = static_cast<uint8_t*>(a.codes) + row * a.code_bytes + i / PER_BYTE;
    if (a.packed && count == N) {
        Pack<uint8_t, BYTES> whole;
#pragma unroll
        for (int j = 0; j < BYTES; ++j) whole.at[j] = codes.at[j];
        *reinterpret_cast<Pack<uint8_t, BYTES>*>(to) = whole;
        return;
    }
#pragma unroll
    for (int j = 0; j < BYTES; ++j)
        if (j * PER_BYTE < count) to[j] = codes.at[j];
}

// The scale of a group, stored by its first lane; what its values are divided by, or multiplied with.
struct Scale {
    Divisor divisor;
    float factor;
    bool divide;
};

__device__ inline Scale make_scale(const Quantise& a, unsigned group, int lane, float amax) {
    if (a.rule >= OCP_FLOOR) {
        const int e = scale_exponent(a, amax);
        if (lane == 0) a.exponents[group] = static_cast<uint8_t>(e + 127);
        return {divisor_of(1.0f), two_to(-e), false};  // exact: a power of two
    }
    const float floored = fmaxf(amax, a.floor);
    const float s = a.rule == STATIC ? *a.given : __fdiv_rn(floored, a.top);
    if (lane == 0 && a.rule != STATIC) a.scales[group] = s;
    const Divisor divisor = divisor_of(s);
    return {divisor, a.quotient == INVERSE ? __fdiv_rn(a.top, floored) : divisor.reciprocal, a.quotient == DIVIDE};
}

template <typename T, bool ACTIVATED> __global__ void __launch_bounds__(THREADS) quantise_kernel(const Quantise a, int shift) {
    constexpr int N = PER_PACK<T>;
    extern __shared__ uint4 kept[];  // a thread's own packs, THREADS apart: no barrier is needed
    __shared__ float across[THREADS / WARP];
    const int lanes = 1 << shift, lane = threadIdx.x & (lanes - 1);
    const unsigned group = blockIdx.x * (THREADS >> shift) + (threadIdx.x >> shift);  // fewer than 2^31 (quantise.py)
    const long long row = group / a.groups;
    const int first = static_cast<int>(group % a.groups) * a.group;
    const int last = min(first + a.group, a.C), stride = lanes * N;
    // A dead group's lanes stay: shuffles and barriers name them.
    const bool live = row < a.act.R && a.act.live(row);
    Pack<T, N>* own = reinterpret_cast<Pack<T, N>*>(kept) + threadIdx.x;

    float amax = 0.0f;
    if (live) {
        int slot = 0;
#pragma unroll 1
        for (int i = first + lane * N; i < last; i += stride, slot += THREADS) {
            const Pack<T, N> x = source<ACTIVATED, T, N>(a, row, i, min(N, last - i));
            own[slot] = x;
            if (ACTIVATED && a.act.h != nullptr) store_h<T, N>(a, row, i, min(N, last - i), x);
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (i + j < last) amax = fmaxf(amax, fabsf(widen(x.at[j])));
        }
    }
    if (a.rule != STATIC) amax = team_max(amax, lanes, across);
    if (!live) return;

    const Scale scale = make_scale(a, group, lane, amax);
    int slot = 0;
#pragma unroll 1
    for (int i = first + lane * N; i < last; i += stride, slot += THREADS) {
        const Pack<T, N> x = own[slot];
        float ratio[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float value = widen(x.at[j]);
            const float exact = scale.divide ? scale.divisor.divides(value) : __fmul_rn(value, scale.factor);
            ratio[j] = fminf(fmaxf(exact, -a.top), a.top);
        }
        const int count = min(N, last - i);
        switch (a.format) {
            case E4M3: store_codes<E4M3, N>(a, row, i, count, ratio); break;
            case E5M2: store_codes<E5M2, N>(a, row, i, count, ratio); break;
            case E3M2: store_codes<E3M2, N>(a, row, i, count, ratio); break;
            case E2M3: store_codes<E2M3, N>(a, row, i, count, ratio); break;
            case E2M1: store_codes<E2M1, N>(a, row, i, count, ratio); break;
            default: store_codes<INT8, N>(a, row, i, count, ratio); break;
        }
    }
}

template <typename T, bool ACTIVATED> cudaError_t launch(const Quantise& a, cudaStream_t stream) {
    const int lanes = pow2_at_least(ceil_div(a.group, PER_PACK<T>), THREADS);
    int shift = 0;
    while (1 << shift < lanes) ++shift;
    const long long blocks = ceil_div(a.act.R * a.groups * lanes, THREADS);
    const size_t bytes = ceil_div(a.group, lanes * PER_PACK<T>) * THREADS * sizeof(uint4);
    quantise_kernel<T, ACTIVATED><<<static_cast<unsigned>(blocks), THREADS, bytes, stream>>>(a, shift);
    return cudaGetLastError();
}

}  // namespace moeproof

extern "C" int moeproof_quantise(
    int dtype, const void* x, void* h, long long R, int C, int activated, int kind, int interleaved, float alpha, float beta,
    float limit, float linear_beta, long long stride_xr, long long stride_xn, long long stride_hr, long long stride_hi,
    int group, int format, int rule, int quotient, float top, float floor, int emax, int top_bits, const float* given,
    void* codes, float* scales, void* exponents, long long code_bytes, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Activate act{x,     h,    stride_xr, stride_xn,   stride_hr, stride_hi, R,          C, kind, interleaved,
                       alpha, beta, limit,     linear_beta, nullptr,   1,         SLOT_VALUES};
    const unsigned groups = static_cast<unsigned>(ceil_div(C, group));
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        constexpr int N = PER_PACK<E>;
        const bool halves = activated && kind < SILU_NO_MUL && !interleaved;
        const int bytes = format == E2M1 ? N / 2 : N;
        const bool packed = packs<E>(x, stride_xr, stride_xn) && (h == nullptr || packs<E>(h, stride_hr, stride_hi)) &&
                            (!halves || C % N == 0) && group % N == 0 && code_bytes % bytes == 0;
        const Quantise a{act,  C,        group, groups, format, rule,   quotient, top,
                         floor, emax, top_bits,  given, codes,  scales, static_cast<uint8_t*>(exponents), packed, code_bytes};
        return activated ? launch<E, true>(a, stream) : launch<E, false>(a, stream);
    });
}
