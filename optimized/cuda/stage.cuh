// What every stage is written with: element types, 16-byte packs, launch errors. One library is made of each .cu file.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

namespace moeproof {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

// Codes that library.py sends for a tensor's dtype.
enum Dtype : int { F32 = 0, F16 = 1, BF16 = 2 };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Round to nearest even, once.
template <typename T> __device__ T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline unsigned bits_of(__half x) { return __half_as_ushort(x); }
__device__ inline unsigned bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
template <typename T> __device__ T of_bits(unsigned bits);
template <> __device__ inline float of_bits<float>(unsigned bits) { return __uint_as_float(bits); }
template <> __device__ inline __half of_bits<__half>(unsigned bits) { return __ushort_as_half(static_cast<uint16_t>(bits)); }
template <> __device__ inline __nv_bfloat16 of_bits<__nv_bfloat16>(unsigned bits) {
    return __ushort_as_bfloat16(static_cast<uint16_t>(bits));
}

template <typename T> constexpr int PER_PACK = 16 / sizeof(T);

// N neighbours in a row, 16 bytes or a single element, as the words in which they are moved. They are taken apart where they are
// used and not where they are loaded: a load whose halves are touched at once must arrive before the next can be sent.
template <typename T, int N> struct alignas(N == 1 ? 4 : 16) Pack {
    static constexpr int PER_WORD = 4 / sizeof(T), WORDS = (N + PER_WORD - 1) / PER_WORD;
    unsigned words[WORDS];

    __device__ T element(int j) const { return of_bits<T>(words[j / PER_WORD] >> (j % PER_WORD * 8 * sizeof(T))); }
    // Of the two bfloat16 in a word either is widened by one instruction.
    __device__ float get(int j) const {
        if constexpr (std::is_same_v<T, __nv_bfloat16>)
            return __uint_as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
        else
            return widen(element(j));
    }
};

template <typename T, int N> __device__ Pack<T, N> pack(const float (&x)[N]) {
    Pack<T, N> all = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
        constexpr int PER_WORD = Pack<T, N>::PER_WORD;
        all.words[j / PER_WORD] |= bits_of(narrow<T>(x[j])) << (j % PER_WORD * 8 * sizeof(T));
    }
    return all;
}

// The largest magnitude of the first `count` elements, NaN left out.
template <typename T, int N> __device__ float largest(const Pack<T, N>& x, int count) {
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j)
        if (j < count) most = fmaxf(most, fabsf(x.get(j)));
    return most;
}

// Packs need 16-byte alignment (`packs`).
template <typename T, int N> __device__ Pack<T, N> load(const T* at) {
    if constexpr (N > 1) return *reinterpret_cast<const Pack<T, N>*>(at);
    else return {{bits_of(*at)}};
}

template <typename T, int N> __device__ void store(T* at, const Pack<T, N>& x) {
    if constexpr (N > 1) *reinterpret_cast<Pack<T, N>*>(at) = x;
    else *at = x.element(0);
}

// Whether rows of `width` elements from `at`, `stride` apart with neighbours `step` apart, are whole packs.
template <typename T> bool packs(const void* at, int width, long long stride, long long step) {
    return step == 1 && width % PER_PACK<T> == 0 && reinterpret_cast<uintptr_t>(at) % 16 == 0 &&
           stride * static_cast<long long>(sizeof(T)) % 16 == 0;
}

__host__ __device__ constexpr long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

inline int pow2_at_least(long long n, int most) {
    int p = 1;
    while (p < n && p < most) p *= 2;
    return p;
}

// Threads of a block for so many lanes: `most`, but fewer where not every multiprocessor would get a block.
inline int spread(long long lanes, int most) {
    while (most > WARP && lanes < 128LL * most) most /= 2;
    return most;
}

// Calls body(T{}) with the element type of `dtype`.
template <typename Body> cudaError_t with_dtype(int dtype, Body body) {
    switch (dtype) {
        case F32: return body(float{});
        case F16: return body(__half{});
        case BF16: return body(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace moeproof

// The words for a code that a launch function returned.
extern "C" const char* moeproof_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
