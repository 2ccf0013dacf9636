// Two 16-bit floats in a word, moved and worked on as one. On the host, where no GPU is, element by element.
#pragma once

#include "stage.cuh"

namespace moeproof {

template <typename T> __device__ unsigned two(T low, T high) { return bits_of(low) | bits_of(high) << 16; }

// low and high, each rounded once to T.
template <typename T> __device__ unsigned narrow_two(float low, float high) { return two(narrow<T>(low), narrow<T>(high)); }

// The larger magnitudes of what two words hold, place by place; a NaN gives way to a number.
template <typename T> __device__ unsigned larger(unsigned a, unsigned b);
template <> __device__ inline unsigned larger<float>(unsigned a, unsigned b) {
    return __float_as_uint(fmaxf(fabsf(__uint_as_float(a)), fabsf(__uint_as_float(b))));
}
template <typename T> __device__ unsigned larger_each(unsigned a, unsigned b) {
    const float low = fmaxf(fabsf(widen(of_bits<T>(a))), fabsf(widen(of_bits<T>(b))));
    const float high = fmaxf(fabsf(widen(of_bits<T>(a >> 16))), fabsf(widen(of_bits<T>(b >> 16))));
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
template <> __device__ inline unsigned larger<__nv_bfloat16>(unsigned a, unsigned b) {
    unsigned most;
    asm("{.reg .b32 x, y; abs.bf16x2 x, %1; abs.bf16x2 y, %2; max.bf16x2 %0, x, y;}" : "=r"(most) : "r"(a), "r"(b));
    return most;
}
template <> __device__ inline unsigned larger<__half>(unsigned a, unsigned b) {
    unsigned most;
    asm("{.reg .b32 x, y; abs.f16x2 x, %1; abs.f16x2 y, %2; max.f16x2 %0, x, y;}" : "=r"(most) : "r"(a), "r"(b));
    return most;
}
// a b + c of bfloat16, each rounded once.
__device__ inline unsigned fma_bf16(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
#else
template <> __device__ inline unsigned larger<__nv_bfloat16>(unsigned a, unsigned b) { return larger_each<__nv_bfloat16>(a, b); }
template <> __device__ inline unsigned larger<__half>(unsigned a, unsigned b) { return larger_each<__half>(a, b); }
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
