// Elementary functions in float32, a few ulp, without overflow. Never compiled with --use_fast_math.
#pragma once

namespace moeproof {

// 1 / d for 1 <= d <= 2, to an ulp: the hardware's estimate and a step of Newton's. A division also minds the ends of the range.
__device__ inline float reciprocal(float d) {
#ifdef __CUDA_ARCH__
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    return fmaf(fmaf(-d, r, 1.0f), r, r);
#else
    return 1.0f / d;
#endif
}

__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) * reciprocal(1.0f + e);
}

__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// x (1 + tanh z) / 2 = x sigmoid(2z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }

}  // namespace moeproof
