// float32 -> codes of narrow formats, rounded once to the nearest, ties to even, clamped to the format's range.
#pragma once

#include "pairs.cuh"

namespace moeproof {

// Codes that quantise.py sends.
enum Format : int { E4M3, E5M2, E3M2, E2M3, E2M1, INT8 };

// A float format, within its range, of BITS mantissa bits whose least normal value is 2^EMIN, in WIDTH bits with the sign on top.
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

// Two E2M1 codes, in bits 0 to 3 and 16 to 19, of two bfloat16 times a power of two (`factor`, twice) that brings them below 8.
//
// Neighbours are 1/2 apart up to 2, then 1, then 2 from 4 on: a magnitude's code is the least of round(2 x), round(x) + 2 and
// round(x / 2) + 4, and at most 7. Added to 64, 130 = 128 + 2 or 264 = 256 + 8, where bfloat16 numbers are 1/2, 1 and 2 apart, x
// is rounded to such a step, and the last bits of the sum are its number.
__device__ inline unsigned two_e2m1(unsigned x, unsigned factor) {
    const unsigned magnitude = x & 0x7fff7fffu;
    unsigned code = fma_bf16(magnitude, factor, 0x42804280u);
    code = __viaddmin_s16x2(fma_bf16(magnitude, factor, 0x43024302u), 0xff80ff80u, code);
    code = __viaddmin_s16x2(fma_bf16(magnitude, factor, 0x43844384u), 0xff00ff00u, code);
    code = __viaddmin_s16x2(code, 0xbd80bd80u, 0x00070007u);  // less the bits of 64
    return code | (x >> 12 & 0x00080008u);
}

// N codes as they lie in memory: bytes, or nibbles of which the even column is the low one.
template <int N> struct Codes {
    unsigned words[(N + 3) / 4];
};

// Eight of them, from four words of two values.
__device__ inline Codes<8> eight_e2m1(const unsigned (&words)[4], unsigned factor) {
    const unsigned a = two_e2m1(words[0], factor) | two_e2m1(words[1], factor) << 8;
    const unsigned b = two_e2m1(words[2], factor) | two_e2m1(words[3], factor) << 8;
    return {{__byte_perm(a, b, 0x5410) | __byte_perm(a, b, 0x7632) << 4, 0}};
}

// The low bytes of four words.
__device__ inline unsigned low_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The nearest integer of |x| < 2^22 in the low bits: a sum with 1.5 2^23 has no room for a fraction.
__device__ inline unsigned integer(float x) { return __float_as_uint(__fadd_rn(x, 12582912.0f)); }

// What the hardware of an H100 converts, two at once and clamped. NaN, of which schemes say nothing, becomes the format's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
template <int FORMAT> constexpr bool CONVERTED = FORMAT == E4M3 || FORMAT == E5M2;
template <int FORMAT> __device__ unsigned two_converted(float low, float high) {
    unsigned short pair;
    if (FORMAT == E4M3) asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    else asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
template <int FORMAT> constexpr bool CONVERTED = false;
template <int FORMAT> __device__ unsigned two_converted(float, float) { return 0; }
#endif

// Of x within the format's range, as a float format.
template <int FORMAT> __device__ unsigned encode(float x) {
    if (FORMAT == E4M3) return minifloat<3, -6, 8>(x);
    if (FORMAT == E5M2) return minifloat<2, -14, 8>(x);
    if (FORMAT == E3M2) return minifloat<2, -2, 6>(x);
    if (FORMAT == E2M3) return minifloat<3, 0, 6>(x);
    return e2m1(x);
}

// CLAMPED to `top` where they may be above it.
template <int FORMAT, int N, bool CLAMPED = true> __device__ Codes<N> encode_all(float (&x)[N], float top) {
    constexpr int WIDTH = FORMAT == E2M1 ? 4 : 8, PER_WORD = 32 / WIDTH;
    Codes<N> codes = {};
    if constexpr (CONVERTED<FORMAT>) {
#pragma unroll
        for (int j = 0; j < N; j += 2)
            codes.words[j / PER_WORD] |= two_converted<FORMAT>(x[j], x[j + 1]) << (j % PER_WORD * WIDTH);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = CLAMPED ? fminf(fmaxf(x[j], -top), top) : x[j];
        if constexpr (FORMAT == INT8) {
#pragma unroll
            for (int j = 0; j < N; j += 4)
                codes.words[j / 4] = low_bytes(integer(x[j]), integer(x[j + 1]), integer(x[j + 2]), integer(x[j + 3]));
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) codes.words[j / PER_WORD] |= encode<FORMAT>(x[j]) << (j % PER_WORD * WIDTH);
        }
    }
    return codes;
}

}  // namespace moeproof
