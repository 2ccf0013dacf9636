// float32 -> codes of narrow formats, rounded once to the nearest, ties to even. The caller has clamped to the format's range.
#pragma once

#include "stage.cuh"

namespace moeproof {

// Codes that quantise.py sends.
enum Format : int { E4M3, E5M2, E3M2, E2M3, E2M1, INT8 };

// A float format of BITS mantissa bits whose least normal value is 2^EMIN, in WIDTH bits with the sign on top.
template <int BITS, int EMIN, int WIDTH> __device__ unsigned minifloat(float x) {
    const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    // Below 2^EMIN codes count steps of 2^(EMIN - BITS): a sum with 2^23 of them rounds to one, and holds their number.
    constexpr unsigned STEPS = static_cast<unsigned>(127 + 23 + EMIN - BITS) << 23;
    constexpr unsigned NORMAL = static_cast<unsigned>(127 + EMIN) << 23;
    constexpr int DROP = 23 - BITS;
    const unsigned small = __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(STEPS)) - STEPS;
    const unsigned large = (magnitude + (1u << (DROP - 1)) - 1 + (magnitude >> DROP & 1)) >> DROP;
    const unsigned code = magnitude < NORMAL ? small : large - (static_cast<unsigned>(126 + EMIN) << BITS);
    return code | bits >> 31 << (WIDTH - 1);
}

// E2M1 in fewer steps. With 2^(e + 22) added, where 2^e <= x < 2^(e + 1) and e >= 0, x is rounded to a step of 2^(e - 1); the
// steps of a binade are numbered from 2 on, so that each binade's codes are its numbers and 2 e.
__device__ inline unsigned e2m1(float x) {
    const float magnitude = fabsf(x);
    const unsigned exponent = __float_as_uint(fmaxf(magnitude, 1.0f)) >> 23, steps = (exponent + 22) << 23;
    const unsigned code = __float_as_uint(magnitude + __uint_as_float(steps)) - steps + 2 * (exponent - 127);
    return code | __float_as_uint(x) >> 31 << 3;
}

__device__ inline unsigned encode(int format, float x) {
    switch (format) {
        case E4M3: return minifloat<3, -6, 8>(x);
        case E5M2: return minifloat<2, -14, 8>(x);
        case E3M2: return minifloat<2, -2, 6>(x);
        case E2M3: return minifloat<3, 0, 6>(x);
        case E2M1: return e2m1(x);
        default: return static_cast<unsigned>(__float2int_rn(x)) & 0xffu;
    }
}

// N codes as they lie in memory: bytes, or nibbles of which the even column is the low one.
template <int N> struct Codes {
    unsigned words[(N + 3) / 4];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
constexpr bool HARDWARE_E4M3 = true;
__device__ inline unsigned two_e4m3(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
constexpr bool HARDWARE_E4M3 = false;
__device__ inline unsigned two_e4m3(float low, float high) { return encode(E4M3, low) | encode(E4M3, high) << 8; }
#endif

template <int FORMAT, int N> __device__ Codes<N> encode_all(const float (&x)[N]) {
    constexpr int WIDTH = FORMAT == E2M1 ? 4 : 8, PER_WORD = 32 / WIDTH;
    Codes<N> codes = {};
    if constexpr (FORMAT == E4M3 && HARDWARE_E4M3) {
#pragma unroll
        for (int j = 0; j < N; j += 2) codes.words[j / PER_WORD] |= two_e4m3(x[j], x[j + 1]) << (j % PER_WORD * WIDTH);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) codes.words[j / PER_WORD] |= encode(FORMAT, x[j]) << (j % PER_WORD * WIDTH);
    }
    return codes;
}

}  // namespace moeproof
