// QUANT1 and QUANT2, alone or with the activation before it: codes and scales, bit for bit as the scheme table says.
//
// A team of lanes owns a group: it takes the group's amax, makes the scale, divides, clamps and rounds. A lane holds up to PACKS
// packs of the group in registers while it waits for the scale, so that all its loads are under way at once and what a group
// costs, its maximum and its scale, is shared by many elements; few elements are spread over as many lanes as there are packs.
// WHOLE kernels have no code for tails and loose rows. Every step is one float32 operation, rounded to nearest: no contraction,
// no approximate division.

#include "activation.cuh"
#include "encode.cuh"

namespace moeproof {

constexpr int THREADS = 256, MOST_THREADS = 1024;  // of a block: more than THREADS only where a team needs them
constexpr int MANY = 4;                            // packs of a lane in large groups
constexpr long long FEW = 128 * 2048;              // lanes that run at once on a large GPU

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
    int whole;           // every row and group is whole packs
    long long code_bytes;  // of a row
};

// a / b, correctly rounded, from b's correctly rounded reciprocal (Markstein 1990, theorem 8): two fused steps instead of a
// division. Needs b far from the ends of the range; a quotient too small for the remainder to be exact rounds to code 0.
struct Divisor {
    float b, reciprocal;
    bool usual;

    // Where `usual`. The remainder is taken with its sign turned, so that the quotient of -0 stays -0.
    __device__ float divides(float a) const {
        const float q = __fmul_rn(a, reciprocal);
        return __fmaf_rn(-__fmaf_rn(q, b, -a), reciprocal, q);
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
// Columns i..i+count of a row, as they lie in memory: the activation comes later, when all loads are under way.
template <bool ACTIVATED, bool WHOLE, typename T, int N>
__device__ Columns<T, N> source(const Quantise& a, long long row, int i, int count) {
    const T* x = static_cast<const T*>(a.act.x) + row * a.act.stride_xr;
    if constexpr (ACTIVATED && WHOLE) return load_columns<T, N>(a.act, row, i);
    else if constexpr (ACTIVATED) return load_loose_columns<T, N>(a.act, row, i, count);
    else if constexpr (WHOLE) return {load<T, N>(x + i), {}};
    Columns<T, N> c = {};
    constexpr int PER_WORD = Pack<T, N>::PER_WORD;
#pragma unroll
    for (int j = 0; j < N; ++j)
        if (j < count) c.first.words[j / PER_WORD] |= bits_of(x[(i + j) * a.act.stride_xn]) << (j % PER_WORD * 8 * sizeof(T));
    return c;
}

template <bool WHOLE, typename T, int N>
__device__ void store_h(const Quantise& a, long long row, int i, int count, const Pack<T, N>& h) {
    T* to = static_cast<T*>(a.act.h) + row * a.act.stride_hr;
    if constexpr (WHOLE) {
        store<T, N>(to + i, h);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (j < count) to[(i + j) * a.act.stride_hi] = h.element(j);
    }
}

template <int FORMAT, bool WHOLE, int N>
__device__ void store_codes(const Quantise& a, long long row, int i, int count, const float (&x)[N]) {
    const Codes<N> codes = encode_all<FORMAT, N>(x);
    constexpr int PER_BYTE = FORMAT == E2M1 ? 2 : 1, BYTES = N / PER_BYTE;
    uint8_t* to = static_cast<uint8_t*>(a.codes) + row * a.code_bytes + i / PER_BYTE;
    if constexpr (!WHOLE) {
#pragma unroll
        for (int j = 0; j < BYTES; ++j)
            if (j * PER_BYTE < count) to[j] = static_cast<uint8_t>(codes.words[j / 4] >> (j % 4 * 8));
    } else if constexpr (BYTES == 8) {
        *reinterpret_cast<uint2*>(to) = {codes.words[0], codes.words[1]};
    } else if constexpr (BYTES == 4) {
        *reinterpret_cast<unsigned*>(to) = codes.words[0];
    } else {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes.words[0]);
    }
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
        return {{1.0f, 1.0f, true}, two_to(-e), false};  // exact: a power of two
    }
    const float floored = fmaxf(amax, a.floor);
    const float s = a.rule == STATIC ? *a.given : __fdiv_rn(floored, a.top);
    if (lane == 0 && a.rule != STATIC) a.scales[group] = s;
    const Divisor divisor = divisor_of(s);
    return {divisor, a.quotient == INVERSE ? __fdiv_rn(a.top, floored) : divisor.reciprocal, a.quotient == DIVIDE};
}

// Moves everything one place down. A loop that works on the first and then rotates has its code once and not for every pack:
// unrolled over packs, activations and formats it would be 300 KiB, and waiting for instructions would cost more than the moves.
template <typename X, int N> __device__ void rotate(X (&x)[N], const X& last) {
#pragma unroll
    for (int i = 0; i + 1 < N; ++i) x[i] = x[i + 1];
    x[N - 1] = last;
}

template <typename T, bool ACTIVATED, int PACKS, bool WHOLE>
__global__ void __launch_bounds__(MOST_THREADS) quantise_kernel(const Quantise a, int shift) {
    constexpr int N = PER_PACK<T>;
    __shared__ float across[MOST_THREADS / WARP];
    const int lanes = 1 << shift, lane = threadIdx.x & (lanes - 1);
    const unsigned group = blockIdx.x * (blockDim.x >> shift) + (threadIdx.x >> shift);  // fewer than 2^31 (quantise.py)
    const unsigned index = a.groups == 1 ? group : group / a.groups;
    const long long row = index;
    const int first = static_cast<int>(group - index * a.groups) * a.group;
    const int last = min(first + a.group, a.C), start = first + lane * N, stride = lanes * N;
    // A dead group's lanes stay: shuffles and barriers name them.
    const bool live = row < a.act.R && a.act.live(row);

    Columns<T, N> own[PACKS];  // `first` becomes what is quantised
    float amax = 0.0f;
    if (live) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const int i = start + p * stride;
            if (i < last) own[p] = source<ACTIVATED, WHOLE, T, N>(a, row, i, WHOLE ? N : min(N, last - i));
        }
#pragma unroll(ACTIVATED ? 1 : PACKS)
        for (int p = 0; p < PACKS; ++p) {
            const int i = start + p * stride, count = WHOLE ? N : min(N, last - i);
            Columns<T, N> c = own[0];
            if (i < last) {
                if constexpr (ACTIVATED) {
                    c.first = activate<T, N>(c, a.act);
                    if (a.act.h != nullptr) store_h<WHOLE>(a, row, i, count, c.first);
                }
                amax = fmaxf(amax, largest(c.first, count));
            }
            rotate(own, c);
        }
    }
    if (a.rule != STATIC) amax = team_max(amax, lanes, across);
    if (!live) return;

    const Scale scale = make_scale(a, group, lane, amax);
#pragma unroll 1
    for (int i = start; i < last; i += stride) {
        const int count = WHOLE ? N : min(N, last - i);
        float ratio[N];
        // One choice for a pack: made for each element, it would cost as much as the division.
        if (scale.divide && scale.divisor.usual) {
#pragma unroll
            for (int j = 0; j < N; ++j) ratio[j] = scale.divisor.divides(own[0].first.get(j));
        } else if (scale.divide) {
#pragma unroll
            for (int j = 0; j < N; ++j) ratio[j] = __fdiv_rn(own[0].first.get(j), scale.divisor.b);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) ratio[j] = __fmul_rn(own[0].first.get(j), scale.factor);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) ratio[j] = fminf(fmaxf(ratio[j], -a.top), a.top);
        switch (a.format) {
            case E4M3: store_codes<E4M3, WHOLE>(a, row, i, count, ratio); break;
            case E5M2: store_codes<E5M2, WHOLE>(a, row, i, count, ratio); break;
            case E3M2: store_codes<E3M2, WHOLE>(a, row, i, count, ratio); break;
            case E2M3: store_codes<E2M3, WHOLE>(a, row, i, count, ratio); break;
            case E2M1: store_codes<E2M1, WHOLE>(a, row, i, count, ratio); break;
            default: store_codes<INT8, WHOLE>(a, row, i, count, ratio); break;
        }
        // No loop around one pack: from it the compiler would lift seven exact divisions, which then are always done.
        if constexpr (PACKS == 1) break;
        rotate(own, own[0]);
    }
}

template <typename T, bool ACTIVATED, int PACKS, bool WHOLE>
cudaError_t launch_teams(const Quantise& a, long long lanes_wanted, cudaStream_t stream) {
    const int lanes = pow2_at_least(lanes_wanted, MOST_THREADS), threads = max(lanes, THREADS);
    int shift = 0;
    while (1 << shift < lanes) ++shift;
    const long long blocks = ceil_div(a.act.R * a.groups * lanes, threads);
    quantise_kernel<T, ACTIVATED, PACKS, WHOLE><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(a, shift);
    return cudaGetLastError();
}

template <typename T, bool ACTIVATED> cudaError_t launch(const Quantise& a, cudaStream_t stream) {
    const long long packs = ceil_div(a.group, PER_PACK<T>);
    if (!a.whole)
        return launch_teams<T, ACTIVATED, MANY, false>(a, ceil_div(packs, MANY), stream);
    // Groups of few packs: a lane for each, so that neighbours read neighbours.
    if (packs < 4 * MANY || (packs <= MOST_THREADS && a.act.R * a.groups * packs <= FEW))
        return launch_teams<T, ACTIVATED, 1, true>(a, packs, stream);
    return launch_teams<T, ACTIVATED, MANY, true>(a, ceil_div(packs, MANY), stream);
}

}  // namespace moeproof

extern "C" int moeproof_quantise(
    int dtype, const void* x, void* h, long long R, int C, int activated, int kind, int interleaved, float alpha, float beta,
    float limit, float linear_beta, long long stride_xr, long long stride_xn, long long stride_hr, long long stride_hi,
    int group, int format, int rule, int quotient, float top, float floor, int emax, int top_bits, const float* given,
    void* codes, float* scales, void* exponents, long long code_bytes, const int* counts, long long region, SLOT_PARAMETERS, cudaStream_t stream) {
    using namespace moeproof;
    const Activate act{x,     h,    stride_xr, stride_xn,   stride_hr, stride_hi, R,          C, kind, interleaved,
                       alpha, beta, limit,     linear_beta, counts,    region,    SLOT_VALUES};
    const unsigned groups = static_cast<unsigned>(ceil_div(C, group));
    return with_dtype(dtype, [&](auto zero) {
        using E = decltype(zero);
        constexpr int N = PER_PACK<E>;
        const bool whole = packs<E>(x, C, stride_xr, stride_xn) && (h == nullptr || packs<E>(h, C, stride_hr, stride_hi)) &&
                           group % N == 0 && reinterpret_cast<uintptr_t>(codes) % N == 0;
        const Quantise a{act,  C,        group, groups, format, rule,   quotient, top,
                         floor, emax, top_bits,  given, codes,  scales, static_cast<uint8_t*>(exponents), whole, code_bytes};
        return activated ? launch<E, true>(a, stream) : launch<E, false>(a, stream);
    });
}
