// QUANT1 and QUANT2, alone or with the activation before it: codes and scales, bit for bit as the scheme table says.
//
// A team of lanes owns a group: it takes the group's amax, makes the scale, divides, clamps and rounds. Bound by bytes only where
// few instructions fall to an element, so a lane holds several packs in registers and shares among them what it costs to find
// its place and to make a scale: of one group where groups are large, of the same group in several rows where they are small.
// Few elements are spread over as many lanes as there are packs. Formats and activations that most layers have are compiled
// alone, others chosen at run time; rows that are not whole packs have kernels of their own. Every step is one float32
// operation, rounded to nearest: no contraction, no approximate division.

#include "activation.cuh"
#include "encode.cuh"

namespace moeproof {

constexpr int THREADS = 256, FEW_THREADS = 128, MOST_THREADS = 1024;  // of a block, but where a team needs more
constexpr int MANY = 4, MOST = 8;                                     // packs of a lane
constexpr long long FEW = 128 * 2048;                                 // lanes that run at once on a large GPU
constexpr int ANY = -1;                                               // a format that is chosen at run time

// Codes that quantise.py sends.
enum Rule : int { AMAX, STATIC, OCP_FLOOR, ROUND_UP };
enum Quotient : int { DIVIDE, RECIPROCAL, INVERSE };

// Where the values come from.
enum Source : int { VALUES, SILU_HALVES, ACTIVATION };

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

__device__ inline Divisor divisor_of(float b) { return {b, __fdiv_rn(1.0f, b), b > 0x1p-60f && b < 0x1p121f}; }

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
template <bool IN_WARP> __device__ float team_max(float x, int lanes, float* across) {
#pragma unroll
    for (int d = 1; d < WARP; d *= 2)
        if (d < lanes) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
    if (IN_WARP || lanes <= WARP) return x;
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / WARP, warps = lanes / WARP;
    if (thread % WARP == 0) across[warp] = x;
    __syncthreads();
    x = across[(warp & ~(warps - 1)) + (thread & (warps - 1))];
#pragma unroll
    for (int d = 1; d < WARP; d *= 2)
        if (d < static_cast<int>(warps)) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
    return x;
}

// Columns i..i+count of a row, as they lie in memory: the activation comes later, when all loads are under way.
template <int SOURCE, bool WHOLE, typename T, int N>
__device__ Columns<T, N> source(const Quantise& a, long long row, int i, int count) {
    const T* x = static_cast<const T*>(a.act.x) + row * a.act.stride_xr;
    if constexpr (SOURCE == SILU_HALVES) return {load<T, N>(x + i), load<T, N>(x + a.C + i)};
    else if constexpr (SOURCE == ACTIVATION && WHOLE) return load_columns<T, N>(a.act, row, i);
    else if constexpr (SOURCE == ACTIVATION) return load_loose_columns<T, N>(a.act, row, i, count);
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

template <int PER_BYTE, bool WHOLE, int N>
__device__ void store_codes(const Quantise& a, long long row, int i, int count, const Codes<N>& codes) {
    constexpr int BYTES = N / PER_BYTE;
    uint8_t* to = static_cast<uint8_t*>(a.codes) + row * a.code_bytes + static_cast<unsigned>(i) / PER_BYTE;
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

// What the values of a group are divided by, or multiplied with.
enum How : int { MULTIPLIED, DIVIDED, DIVIDED_SLOWLY };
struct Scale {
    Divisor divisor;
    float factor;
    How how;
};

// The scale of a group: stored by one lane, where `stores`. KNOWN arithmetic makes a kernel without the code of the others.
enum Known : int { MX, DIVISION, INVERSION, UNKNOWN };
template <int KNOWN> __device__ Scale make_scale(const Quantise& a, unsigned group, bool stores, float amax) {
    if (KNOWN == MX || (KNOWN == UNKNOWN && a.rule >= OCP_FLOOR)) {
        const int e = scale_exponent(a, amax);
        if (stores) a.exponents[group] = static_cast<uint8_t>(e + 127);
        return {{1.0f, 1.0f, true}, two_to(-e), MULTIPLIED};  // exact: a power of two
    }
    const float floored = fmaxf(amax, a.floor);
    const float s = KNOWN == UNKNOWN && a.rule == STATIC ? *a.given : __fdiv_rn(floored, a.top);
    if (stores && !(KNOWN == UNKNOWN && a.rule == STATIC)) a.scales[group] = s;
    if (KNOWN == DIVISION) return {divisor_of(s), 1.0f, DIVIDED};
    if (KNOWN == INVERSION) return {{s, 1.0f, true}, __fdiv_rn(a.top, floored), MULTIPLIED};
    const Divisor divisor = divisor_of(s);
    const How how = a.quotient != DIVIDE ? MULTIPLIED : divisor.usual ? DIVIDED : DIVIDED_SLOWLY;
    return {divisor, a.quotient == INVERSE ? __fdiv_rn(a.top, floored) : divisor.reciprocal, how};
}

template <int HOW, typename T, int N> __device__ void quotients(const Pack<T, N>& x, const Scale& scale, float (&ratio)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (HOW == MULTIPLIED) ratio[j] = __fmul_rn(x.get(j), scale.factor);
        if (HOW == DIVIDED) ratio[j] = scale.divisor.divides(x.get(j));
        if (HOW == DIVIDED_SLOWLY) ratio[j] = __fdiv_rn(x.get(j), scale.divisor.b);
    }
}

// A pack's codes, at their place.
template <int FORMAT, int KNOWN, bool WHOLE, typename T, int N>
__device__ void quantise_pack(const Quantise& a, long long row, int i, int count, const Pack<T, N>& x, const Scale& scale) {
    constexpr bool PAIRS = FORMAT == E2M1 && KNOWN == MX && std::is_same_v<T, __nv_bfloat16>;
    if constexpr (PAIRS) {
        const unsigned factor = __float_as_uint(scale.factor);  // its lower half is empty
        store_codes<2, WHOLE>(a, row, i, count, eight_e2m1(x.words, factor | factor >> 16));
    } else if constexpr (KNOWN != UNKNOWN) {
        float ratio[N];
        quotients<KNOWN == DIVISION ? DIVIDED : MULTIPLIED>(x, scale, ratio);
        // What is divided by its own group's maximum is not above the top, or rounds to it.
        constexpr bool CLAMPED = KNOWN == MX;
        store_codes<FORMAT == E2M1 ? 2 : 1, WHOLE>(a, row, i, count, encode_all<FORMAT, N, CLAMPED>(ratio, a.top));
    } else {
        // One choice for a pack: made for each element, it would cost as much as the division.
        float ratio[N];
        if (scale.how == DIVIDED) quotients<DIVIDED>(x, scale, ratio);
        else if (scale.how == MULTIPLIED) quotients<MULTIPLIED>(x, scale, ratio);
        else quotients<DIVIDED_SLOWLY>(x, scale, ratio);
        switch (a.format) {
            case E4M3: store_codes<1, WHOLE>(a, row, i, count, encode_all<E4M3, N>(ratio, a.top)); break;
            case E5M2: store_codes<1, WHOLE>(a, row, i, count, encode_all<E5M2, N>(ratio, a.top)); break;
            case E3M2: store_codes<1, WHOLE>(a, row, i, count, encode_all<E3M2, N>(ratio, a.top)); break;
            case E2M3: store_codes<1, WHOLE>(a, row, i, count, encode_all<E2M3, N>(ratio, a.top)); break;
            case E2M1: store_codes<2, WHOLE>(a, row, i, count, encode_all<E2M1, N>(ratio, a.top)); break;
            default: store_codes<1, WHOLE>(a, row, i, count, encode_all<INT8, N>(ratio, a.top)); break;
        }
    }
}

// Moves everything one place down. A loop that works on the first and then rotates has its code once and not for every pack:
// activations and formats that are chosen at run time would be hundreds of KiB, and waiting for instructions costs more.
template <typename X, int N> __device__ void rotate(X (&x)[N], const X& last) {
#pragma unroll
    for (int i = 0; i + 1 < N; ++i) x[i] = x[i + 1];
    x[N - 1] = last;
}

// Bit j says whether row first + j * step is there and live.
template <int ROWS, bool PLAIN> __device__ unsigned live_rows(const Activate& a, unsigned first, unsigned step) {
    unsigned live = 0;
    if (!PLAIN && a.slots.ids != nullptr) {
        int local[ROWS];
        a.slots.locals(static_cast<int>(first), static_cast<int>(step), static_cast<int>(a.R), local);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) live |= static_cast<unsigned>(local[j] >= 0) << j;
        return live;
    }
#pragma unroll
    for (int j = 0; j < ROWS; ++j) live |= static_cast<unsigned>(first + j * step < a.R) << j;
    if (!PLAIN && a.counts != nullptr)
#pragma unroll 1
        for (int j = 0; j < ROWS; ++j)
            if (live >> j & 1 && !a.live(first + j * step)) live &= ~(1u << j);
    return live;
}

// A lane's packs: PACKS of one group; or, ACROSS rows, one of the same group in each of PACKS rows, which suits small groups.
template <typename T, int FORMAT, int KNOWN, int SOURCE, int PACKS, bool ACROSS, bool WHOLE>
__global__ void __launch_bounds__(ACROSS ? THREADS : MOST_THREADS) quantise_kernel(const Quantise a, int shift) {
    constexpr int N = PER_PACK<T>, ROWS = ACROSS ? PACKS : 1;
    constexpr bool PLAIN = SOURCE == VALUES && KNOWN != UNKNOWN;  // every row is live
    __shared__ float across[MOST_THREADS / WARP];
    const int lanes = 1 << shift, column = blockIdx.y * blockDim.x + threadIdx.x, lane = column & (lanes - 1);
    const unsigned group = static_cast<unsigned>(column) >> shift, first_row = blockIdx.x * ROWS * blockDim.y + threadIdx.y;
    const int first = group * a.group, last = min(first + a.group, a.C), start = first + lane * N;
    const int stride = ACROSS ? 0 : lanes * N, row_step = ACROSS ? blockDim.y : 0;
    // A dead group's lanes stay: shuffles and barriers name them.
    const unsigned live = group < a.groups ? live_rows<ROWS, PLAIN>(a.act, first_row, blockDim.y) : 0;
    const auto row = [&](int p) { return static_cast<long long>(first_row) + p * row_step; };
    const auto there = [&](int p) { return (live >> (ACROSS ? p : 0) & 1) && start + p * stride < last; };
    const auto count = [&](int p) { return WHOLE ? N : min(N, last - (start + p * stride)); };

    Columns<T, N> own[PACKS];  // `first` becomes what is quantised
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
        if (there(p)) own[p] = source<SOURCE, WHOLE, T, N>(a, row(p), start + p * stride, count(p));
    Largest<T> most[ROWS];
#pragma unroll(SOURCE == ACTIVATION ? 1 : PACKS)
    for (int p = 0; p < PACKS; ++p) {
        Columns<T, N> c = own[0];
        if (there(p)) {
            if constexpr (SOURCE == SILU_HALVES) c.first = apply<SILU, false>(c, a.act);
            if constexpr (SOURCE == ACTIVATION) c.first = activate<T, N>(c, a.act);
            if (SOURCE != VALUES && a.act.h != nullptr) store_h<WHOLE>(a, row(p), start + p * stride, count(p), c.first);
            most[ACROSS ? p : 0].take(c.first);
        }
        rotate(own, c);
    }
    Scale scale[ROWS];
    if constexpr (ACROSS && PACKS > 1 && KNOWN != MX) {
        // A scale costs as much as a pack: each is made by some lanes, for all of the team.
        float mine = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float amax = team_max<true>(most[r].value(), lanes, across);
            if (lane % ROWS == r) mine = amax;
        }
        const int r = lane % ROWS, leader = threadIdx.y * blockDim.x + threadIdx.x - lane;
        const bool stores = lane < ROWS && (live >> r & 1);
        const Scale made = make_scale<KNOWN>(a, static_cast<unsigned>(row(r)) * a.groups + group, stores, mine);
#pragma unroll
        for (int p = 0; p < ROWS; ++p) {
            scale[p] = made;
            scale[p].divisor.b = __shfl_sync(ALL, made.divisor.b, leader % WARP + p);
            if (KNOWN == DIVISION) scale[p].divisor.reciprocal = __shfl_sync(ALL, made.divisor.reciprocal, leader % WARP + p);
            else scale[p].factor = __shfl_sync(ALL, made.factor, leader % WARP + p);
        }
    } else {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const bool known = KNOWN == UNKNOWN && a.rule == STATIC;
            const float amax = known ? 0.0f : team_max<ACROSS>(most[r].value(), lanes, across);
            const unsigned index = static_cast<unsigned>(row(r)) * a.groups + group;
            if (live >> r & 1) scale[r] = make_scale<KNOWN>(a, index, lane == 0, amax);
        }
    }
#pragma unroll(KNOWN == UNKNOWN ? 1 : PACKS)
    for (int p = 0; p < PACKS; ++p) {
        if (there(p)) {
            const Scale& s = scale[ACROSS ? p : 0];
            quantise_pack<FORMAT, KNOWN, WHOLE>(a, row(p), start + p * stride, count(p), own[0].first, s);
        }
        // No loop around one pack: from it the compiler would lift eight exact divisions, which then are always done.
        if constexpr (PACKS == 1) break;
        rotate(own, own[0]);
    }
}

// A row's groups lie along x and on along the grid's y; blocks take as many rows as they have room for. Teams are whole in x,
// warps in the block.
inline dim3 block_of(long long width, int lanes, long long rows, int threads) {
    const long long share = ceil_div(width, ceil_div(width, threads));
    int x = static_cast<int>(ceil_div(share, lanes) * lanes), together = 1;  // rows that fill whole warps
    while (x * together % WARP) together *= 2;
    if (x * together > threads) {
        x = static_cast<int>(ceil_div(x, WARP) * WARP);
        together = 1;
    }
    const long long wanted = min(ceil_div(rows, together), static_cast<long long>(max(threads / x / together, 1)));
    return dim3(x, static_cast<unsigned>(wanted) * together);
}

template <typename T, int FORMAT, int KNOWN, int SOURCE, int PACKS, bool ACROSS, bool WHOLE>
cudaError_t launch_teams(const Quantise& a, long long lanes_wanted, int usual_threads, cudaStream_t stream) {
    const int lanes = pow2_at_least(lanes_wanted, MOST_THREADS);
    int shift = 0;
    while (1 << shift < lanes) ++shift;
    const long long width = static_cast<long long>(a.groups) * lanes, rows = ceil_div(a.act.R, ACROSS ? PACKS : 1);
    const dim3 block = block_of(width, lanes, rows, max(lanes, usual_threads));
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, block.y)), static_cast<unsigned>(ceil_div(width, block.x)));
    quantise_kernel<T, FORMAT, KNOWN, SOURCE, PACKS, ACROSS, WHOLE><<<grid, block, 0, stream>>>(a, shift);
    return cudaGetLastError();
}

// Rows of whole packs.
template <typename T, int FORMAT, int KNOWN, int SOURCE> cudaError_t launch_whole(const Quantise& a, cudaStream_t stream) {
    const long long packs = a.group / PER_PACK<T>;
    const bool few = a.act.R * a.groups * packs <= FEW;
    if (packs <= MOST_THREADS && (few || packs < 4 * MANY)) {
        if constexpr (KNOWN == MX)
            if (!few) return launch_teams<T, FORMAT, KNOWN, SOURCE, MANY, true, true>(a, packs, THREADS, stream);
        return launch_teams<T, FORMAT, KNOWN, SOURCE, 1, KNOWN == MX, true>(a, packs, few ? FEW_THREADS : THREADS, stream);
    }
    if constexpr (SOURCE == VALUES && KNOWN != MX && KNOWN != UNKNOWN) {
        // Neighbours read neighbours: a group of half a warp, or a row to a warp, which needs no barrier.
        if (packs == 4 * MANY) return launch_teams<T, FORMAT, KNOWN, SOURCE, MANY, true, true>(a, packs, THREADS, stream);
        if (packs > MANY * WARP)
            return launch_teams<T, FORMAT, KNOWN, SOURCE, MOST, false, true>(a, ceil_div(packs, MOST), THREADS, stream);
    }
    if constexpr (KNOWN == MX) return cudaErrorInvalidValue;  // no group is that large
    else return launch_teams<T, FORMAT, KNOWN, SOURCE, MANY, false, true>(a, ceil_div(packs, MANY), THREADS, stream);
}

template <typename T, int SOURCE> cudaError_t launch_format(const Quantise& a, cudaStream_t stream) {
    if constexpr (SOURCE != ACTIVATION && std::is_same_v<T, __nv_bfloat16>) {
        const bool every = SOURCE != VALUES || (a.act.slots.ids == nullptr && a.act.counts == nullptr);
        const bool mx = every && a.rule >= OCP_FLOOR && a.group < 4 * MANY * PER_PACK<T>;
        // The least scale is far from the ends of the range.
        const bool dynamic = every && a.rule == AMAX && a.floor > 1e-12f;
        if (mx && a.format == E4M3) return launch_whole<T, E4M3, MX, SOURCE>(a, stream);
        if (mx && a.format == E2M1) return launch_whole<T, E2M1, MX, SOURCE>(a, stream);
        if (dynamic && a.quotient == DIVIDE && a.format == E4M3) return launch_whole<T, E4M3, DIVISION, SOURCE>(a, stream);
        if (dynamic && a.quotient == INVERSE && a.format == INT8) return launch_whole<T, INT8, INVERSION, SOURCE>(a, stream);
    }
    return launch_whole<T, ANY, UNKNOWN, SOURCE>(a, stream);
}

template <typename T> cudaError_t launch(const Quantise& a, bool activated, cudaStream_t stream) {
    if (!a.whole) {
        const long long lanes = ceil_div(ceil_div(a.group, PER_PACK<T>), MANY);
        if (activated) return launch_teams<T, ANY, UNKNOWN, ACTIVATION, MANY, false, false>(a, lanes, THREADS, stream);
        return launch_teams<T, ANY, UNKNOWN, VALUES, MANY, false, false>(a, lanes, THREADS, stream);
    }
    if (!activated) return launch_format<T, VALUES>(a, stream);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        if (a.act.kind == SILU && a.act.limit <= 0.0f && !a.act.interleaved) return launch_format<T, SILU_HALVES>(a, stream);
    return launch_format<T, ACTIVATION>(a, stream);
}

}  // namespace moeproof

extern "C" int moeproof_quantise(
    int dtype, const void* x, void* h, long long R, int C, int activated, int kind, int interleaved, float alpha, float beta,
    float limit, float linear_beta, long long stride_xr, long long stride_xn, long long stride_hr, long long stride_hi,
    int group, int format, int rule, int quotient, float top, float floor, int emax, int top_bits, const float* given,
    void* codes, float* scales, void* exponents, long long code_bytes, const int* counts, unsigned region, SLOT_PARAMETERS, cudaStream_t stream) {
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
        return launch<E>(a, activated, stream);
    });
}
