// What every stage is written with: element types, 16-byte packs, launch errors. One library is made of each .cu file.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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

// N neighbours in a row, moved as one access.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <typename T> constexpr int PER_PACK = 16 / sizeof(T);

// `count` elements (at most N) from `at`. Whole packs need 16-byte alignment; the tail of a row comes one by one.
template <typename T, int N> __device__ Pack<T, N> load(const T* at, int count) {
    if constexpr (N > 1) {
        if (count < N) {
            Pack<T, N> x;
#pragma unroll
            for (int j = 0; j < N; ++j) x.at[j] = j < count ? at[j] : narrow<T>(0.0f);
            return x;
        }
    }
    return *reinterpret_cast<const Pack<T, N>*>(at);
}

template <typename T, int N> __device__ void store(T* at, int count, const Pack<T, N>& x) {
    if constexpr (N > 1) {
        if (count < N) {
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (j < count) at[j] = x.at[j];
            return;
        }
    }
    *reinterpret_cast<Pack<T, N>*>(at) = x;
}

// Whether rows from `at`, `stride` elements apart with neighbours `step` apart, can be read in 16-byte packs. A single
// element has any step.
template <typename T> bool packs(const void* at, long long stride, long long step) {
    return step == 1 && reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride * static_cast<long long>(sizeof(T)) % 16 == 0;
}

__host__ __device__ constexpr long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

inline int pow2_at_least(long long n, int most) {
    int p = 1;
    while (p < n && p < most) p *= 2;
    return p;
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
