// Two 16-bit floats in a word, moved and worked on as one. On the host, where no GPU is, element by element.
#pragma once

#include "stage.cuh"

namespace moeproof {

template <typename T> __device__ unsigned two(T low, T high) { return bits_of(low) | bits_of(high) << 16; }

// low and high, each rounded once to T.
template <typename T> __device__ unsigned narrow_two(float low, float high) { return two(narrow<T>(low), narrow<T>(high)); }

// The larger of what a word of magnitudes holds and of the magnitudes of another, place by place; a NaN gives way to a number.
template <typename T> __device__ unsigned larger(unsigned most, unsigned x);
template <> __device__ inline unsigned larger<float>(unsigned most, unsigned x) {
    return __float_as_uint(fmaxf(__uint_as_float(most), fabsf(__uint_as_float(x))));
}
template <typename T> __device__ unsigned larger_each(unsigned most, unsigned x) {
    const float low = fmaxf(widen(of_bits<T>(most)), fabsf(widen(of_bits<T>(x))));
    const float high = fmaxf(widen(of_bits<T>(most >> 16)), fabsf(widen(of_bits<T>(x >> 16))));
    return narrow_two<T>(low, high);
}

#ifdef __CUDA_ARCH__
template <> __device__ inline unsigned narrow_two<__nv_bfloat16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <> __device__ inline unsigned narrow_two<__half>(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <> __device__ inline unsigned larger<__nv_bfloat16>(unsigned most, unsigned x) {
    asm("{.reg .b32 y; abs.bf16x2 y, %1; max.bf16x2 %0, %0, y;}" : "+r"(most) : "r"(x));
    return most;
}
template <> __device__ inline unsigned larger<__half>(unsigned most, unsigned x) {
    asm("{.reg .b32 y; abs.f16x2 y, %1; max.f16x2 %0, %0, y;}" : "+r"(most) : "r"(x));
    return most;
}
// a b + c of bfloat16, each rounded once.
__device__ inline unsigned fma_bf16(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
#else
template <> __device__ inline unsigned larger<__nv_bfloat16>(unsigned most, unsigned x) { return larger_each<__nv_bfloat16>(most, x); }
template <> __device__ inline unsigned larger<__half>(unsigned most, unsigned x) { return larger_each<__half>(most, x); }
__device__ inline unsigned fma_bf16(unsigned a, unsigned b, unsigned c) {
    const auto one = [&](int shift) {
        const auto at = [&](unsigned word) { return static_cast<double>(widen(of_bits<__nv_bfloat16>(word >> shift))); };
        // To a multiple of the last place of eight binary digits: exact, so that nothing is rounded twice.
        const double sum = at(a) * at(b) + at(c);
        if (sum == 0.0 || !(fabs(sum) < INFINITY)) return narrow<__nv_bfloat16>(static_cast<float>(sum));
        const double place = ldexp(1.0, max(ilogb(sum), -126) - 7);
        return narrow<__nv_bfloat16>(static_cast<float>(nearbyint(sum / place) * place));
    };
    return two(one(0), one(16));
}
#endif

// The largest magnitude of many packs, NaN left out.
template <typename T> struct Largest {
    unsigned words = 0;

    template <int N> __device__ void take(const Pack<T, N>& x) {
#pragma unroll
        for (int j = 0; j < Pack<T, N>::WORDS; ++j) words = larger<T>(words, x.words[j]);
    }

    __device__ float value() const {
        const float first = widen(of_bits<T>(words));
        return sizeof(T) == 4 ? first : fmaxf(first, widen(of_bits<T>(words >> 16)));
    }
};

}  // namespace moeproof
