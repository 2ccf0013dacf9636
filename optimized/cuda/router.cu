// ROUTE: logits to ids and weights, a warp for each token. Total: NaN and infinite logits give the contract's rows.
//
// A lane holds every 32nd expert. A score is compared as an unsigned key of the same order, so that the best of a warp is one
// `redux` and a tie goes to the lowest id by a second. Scores also lie in shared memory, where a weight is looked up by id.
// PLAIN routers, which most models have, get a kernel without the code of groups, tables, soft caps and rarer scores: few
// tokens cost as much as it takes to fetch instructions.

#include "elementary.cuh"
#include "stage.cuh"

namespace moeproof {

constexpr int WARPS = 4;
constexpr int MOST_PER_LANE = 32;
constexpr float LARGEST = 3.4028234663852886e38f;
constexpr float TINY = 1e-37f;
constexpr unsigned TAKEN = 0;  // below the key of -inf

// Codes that router.py sends.
enum Score : int { SOFTMAX, SOFTMAX_TOPK, SIGMOID, SQRTSOFTPLUS, SPARSEMIXER };
enum Renorm : int { NONE, SUM, EPS, FLOOR, LP };

struct Route {
    const void* logits;  // (T, width)
    long long stride_t, stride_e;
    const float* bias;          // (width,)
    const float* expert_scale;  // (E,), E = width - zero experts
    const int* table;           // (T, K)
    long long stride_table_t, stride_table_k;
    int* ids;        // (T, K + fused)
    float* weights;  // (T, K + fused)
    long long T;
    int dtype, width, E, K, score, groups, keep, top2, rejected_zero, renorm, fused;
    float renorm_value, scale, multiplier, softcap, jitter_eps;
};

// Order-preserving: a > b as floats exactly where key(a) > key(b). -0 and 0 are one; NaN is -inf.
__device__ inline unsigned key(float x) {
    if (x != x) x = -INFINITY;
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float of_key(unsigned k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int d = WARP / 2; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
}

__device__ inline float warp_max(float x) { return of_key(__reduce_max_sync(ALL, key(x))); }

// What to subtract before exp: 0 where nothing is finite.
__device__ inline float or_zero(float best) { return best == -INFINITY ? 0.0f : best; }

// Logits of this lane, as they lie in memory: all are under way before the first is looked at. -inf beyond the last expert.
template <int PER> __device__ void load_logits(const Route& a, long long t, unsigned (&raw)[PER]) {
    const int lane = threadIdx.x % WARP;
    const long long row = t * a.stride_t;
    if (a.dtype == F32) {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int e = i * WARP + lane;
            raw[i] = e < a.width ? static_cast<const unsigned*>(a.logits)[row + e * a.stride_e] : 0xff800000u;
        }
    } else {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int e = i * WARP + lane;
            const unsigned none = a.dtype == F16 ? 0xfc00u : 0xff80u;
            raw[i] = e < a.width ? static_cast<const uint16_t*>(a.logits)[row + e * a.stride_e] : none;
        }
    }
}

template <bool PLAIN> __device__ float logit_of(const Route& a, unsigned raw) {
    float x = __uint_as_float(raw);
    if (a.dtype == F16) x = widen(of_bits<__half>(raw));
    else if (a.dtype == BF16) x = widen(of_bits<__nv_bfloat16>(raw));
    x = (x != x ? -INFINITY : fminf(x, LARGEST)) * a.multiplier;
    if (!PLAIN && a.softcap > 0.0f) x = a.softcap * tanhf(x / a.softcap);
    return fminf(x, LARGEST);
}

// The lowest expert of the largest key of the warp, and that key.
template <int PER> __device__ int best_of(const unsigned (&keys)[PER], unsigned& best) {
    const int lane = threadIdx.x % WARP;
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) mine = max(mine, keys[i]);
    best = __reduce_max_sync(ALL, mine);
    unsigned id = ~0u;
#pragma unroll
    for (int i = PER - 1; i >= 0; --i)
        if (keys[i] == best) id = i * WARP + lane;
    return static_cast<int>(__reduce_min_sync(ALL, id));
}

// Bit g is set where group g is kept: the `keep` best by their maximum or the sum of their two best, ties to the lowest.
template <int PER> __device__ unsigned kept_groups(const Route& a, const unsigned (&keys)[PER]) {
    const int lane = threadIdx.x % WARP, size = a.width / a.groups;
    unsigned score = TAKEN;
    for (int g = 0; g < a.groups; ++g) {
        unsigned inside[PER], best, second;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int e = i * WARP + lane;
            inside[i] = e >= g * size && e < (g + 1) * size ? keys[i] : TAKEN;
        }
        const int first = best_of<PER>(inside, best);
        float sum = of_key(best);
        if (a.top2) {
#pragma unroll
            for (int i = 0; i < PER; ++i)
                if (i * WARP + lane == first) inside[i] = TAKEN;
            best_of<PER>(inside, second);
            sum += of_key(second);
        }
        if (lane == g) score = key(sum);
    }
    unsigned kept = 0;
    for (int n = 0; n < a.keep; ++n) {
        const unsigned best = __reduce_max_sync(ALL, score);
        const unsigned holders = __ballot_sync(ALL, score == best);
        const int pick = __ffs(holders) - 1;
        kept |= 1u << pick;
        if (lane == pick) score = TAKEN;
    }
    return kept;
}

// sparsemixer: the softmax, at the best of what is left, over what is not far below it.
template <int PER> __device__ float sparsemixer_weight(const Route& a, const float* x, const unsigned (&keys)[PER], unsigned top) {
    const float best = or_zero(of_key(top));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int e = i * WARP + threadIdx.x % WARP;
        if (e >= a.width) continue;
        const float own = x[e], rest = keys[i] == TAKEN ? -INFINITY : own;
        const bool far = best - own > 2.0f * a.jitter_eps * fmaxf(fabsf(own), best);
        sum += far || rest == -INFINITY ? 0.0f : expf(rest - best);
    }
    sum = warp_sum(sum);
    return of_key(top) == -INFINITY ? 0.0f : 1.0f / fmaxf(sum, 1.0f);
}

// What the weights, one for each lane below K and 0 in the others, are divided by.
template <bool PLAIN> __device__ float norm(const Route& a, float w) {
    if (!PLAIN && a.renorm == LP) {
        // Relative to the largest, so that no power overflows.
        const float largest = warp_max(fabsf(w)), ratio = fabsf(w) / fmaxf(largest, TINY);
        const float total = fmaxf(warp_sum(ratio > 0.0f ? powf(ratio, a.renorm_value) : 0.0f), TINY);
        return fmaxf(largest * powf(total, 1.0f / a.renorm_value), 1e-20f);
    }
    const float total = warp_sum(w);
    if (a.renorm == EPS) return total + a.renorm_value;
    return fmaxf(total, a.renorm == FLOOR ? a.renorm_value : 1e-20f);
}

template <int PER, bool PLAIN> __global__ void __launch_bounds__(WARPS* WARP) route_kernel(const Route a) {
    extern __shared__ float memory[];
    const int lane = threadIdx.x % WARP;
    const long long t = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (t >= a.T) return;  // whole warps leave, and no barrier is wider than a warp
    float* scores = memory + threadIdx.x / WARP * a.width;

    unsigned raw[PER];
    load_logits<PER>(a, t, raw);
    float x[PER], bias[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) bias[i] = a.bias != nullptr && i * WARP + lane < a.width ? a.bias[i * WARP + lane] : 0.0f;
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        x[i] = i * WARP + lane < a.width ? logit_of<PLAIN>(a, raw[i]) : -INFINITY;
        best = fmaxf(best, x[i]);
    }
    float scale = 1.0f;
    if (a.score == SOFTMAX) {
        best = or_zero(warp_max(best));
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; ++i) sum += expf(x[i] - best);
        scale = fmaxf(warp_sum(sum), TINY);
    }
    unsigned keys[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int e = i * WARP + lane;
        float score = x[i];
        if (a.score == SOFTMAX) score = expf(x[i] - best) / scale;
        else if (a.score == SIGMOID) score = sigmoid(x[i]);
        else if (!PLAIN && a.score == SQRTSOFTPLUS) score = sqrtf(softplus(x[i]));
        if (e < a.width) {
            scores[e] = score;
            keys[i] = x[i] == -INFINITY ? key(-INFINITY) : key(score + bias[i]);
        } else {
            keys[i] = TAKEN;
        }
    }
    __syncwarp();

    const int size = !PLAIN && a.groups ? a.width / a.groups : a.width;
    if (!PLAIN && a.keep && a.keep < a.groups) {
        const unsigned kept = kept_groups<PER>(a, keys);
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int e = i * WARP + lane;
            // What has no finite logit stays -inf.
            if (e < a.width && !(kept >> e / size & 1) && x[i] != -INFINITY) keys[i] = key(a.rejected_zero ? 0.0f : -INFINITY);
        }
    }

    int id = 0, used = 0;  // lane k holds slot k; lane g counts what group g has given
    float w = 0.0f;
    for (int k = 0; k < a.K; ++k) {
        unsigned top;
        int pick = best_of<PER>(keys, top);
        if (!PLAIN && a.table != nullptr) pick = a.table[t * a.stride_table_t + k * a.stride_table_k];
        const bool known = pick >= 0 && pick < a.width;
        float weight = known ? scores[pick] : 0.0f;
        if (!PLAIN && a.score == SPARSEMIXER) weight = sparsemixer_weight<PER>(a, scores, keys, top);
        if (lane == k) id = pick, w = weight;
        bool closed = false;
        if (!PLAIN && a.groups && !a.keep) {
            // A fixed quota from every group: one that has given its share is closed.
            if (lane == pick / size) ++used;
            closed = __shfl_sync(ALL, used, pick / size) >= a.K / a.groups;
        }
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int e = i * WARP + lane;
            if (e == pick || (closed && e / size == pick / size)) keys[i] = TAKEN;
        }
    }

    const bool routed = lane < a.K;
    if (a.score == SOFTMAX_TOPK) {
        const float top = or_zero(warp_max(routed ? w : -INFINITY));
        w = routed ? expf(w - top) : 0.0f;
        w = w / fmaxf(warp_sum(w), TINY);
    }
    if (a.renorm != NONE) w = w / norm<PLAIN>(a, w);
    w *= a.scale;
    if (a.expert_scale != nullptr && routed && id >= 0 && id < a.E) w *= a.expert_scale[id];
    const long long row = t * (a.K + a.fused);
    if (routed) {
        a.ids[row + lane] = id;
        a.weights[row + lane] = w;
    }
    // Fused shared experts: ids after the routed ones, weight 1, never scaled.
    for (int j = lane; j < a.fused; j += WARP) {
        a.ids[row + a.K + j] = a.E + j;
        a.weights[row + a.K + j] = 1.0f;
    }
}

template <int PER> cudaError_t launch(const Route& a, cudaStream_t stream) {
    if constexpr (PER <= MOST_PER_LANE) {
        if (a.width > PER * WARP) return launch<2 * PER>(a, stream);
        const unsigned blocks = static_cast<unsigned>(ceil_div(a.T, WARPS));
        const size_t bytes = WARPS * a.width * sizeof(float);
        if (a.groups == 0 && a.table == nullptr && a.score <= SIGMOID && a.softcap <= 0.0f && a.renorm != LP)
            route_kernel<PER, true><<<blocks, WARPS * WARP, bytes, stream>>>(a);
        else route_kernel<PER, false><<<blocks, WARPS * WARP, bytes, stream>>>(a);
        return cudaGetLastError();
    }
    return cudaErrorInvalidValue;
}

}  // namespace moeproof

extern "C" int moeproof_route(
    int dtype, const void* logits, long long stride_t, long long stride_e, const float* bias, const float* expert_scale,
    const int* table, long long stride_table_t, long long stride_table_k, int* ids, float* weights, long long T, int width,
    int E, int K, int score, int groups, int keep, int top2, int rejected_zero, int renorm, float renorm_value, float scale,
    float multiplier, float softcap, float jitter_eps, int fused, cudaStream_t stream) {
    using namespace moeproof;
    const Route a{logits, stride_t, stride_e, bias,  expert_scale, table, stride_table_t, stride_table_k, ids,    weights,
                  T,      dtype,    width,    E,     K,            score, groups,         keep,           top2,   rejected_zero,
                  renorm, fused,    renorm_value, scale, multiplier, softcap, jitter_eps};
    return launch<1>(a, stream);
}
