// Which (token, slot) goes to which local expert: the device twin of slots.py. Slot s is (token s / K, slot s % K).
#pragma once

#include "stage.cuh"

namespace moeproof {

struct Slots {
    const void* ids;        // (T, K) int32 or int64; -1, remote and out-of-range ids are dead
    int wide;               // 1 = int64
    const int* expert_map;  // (num_experts,): local index or -1; null = identity
    long long stride_t, stride_k;
    int num_experts, num_local;
    unsigned K;

    // An id as it lies in memory. What it says comes later (`id`), so that many can be under way at once.
    struct Raw {
        int low, high;
    };

    __device__ Raw raw_at(long long at) const {
        if (!wide) return {static_cast<const int*>(ids)[at], 0};
        const int2 both = static_cast<const int2*>(ids)[at];
        return {both.x, both.y};
    }

    __device__ bool flat() const { return stride_k == 1 && stride_t == K; }

    // Slots number fewer than 2^31 (slots.py): one 32-bit division. Offsets do not fit 32 bits.
    __device__ Raw raw(unsigned slot) const {
        const long long at = flat() ? slot : slot / K * stride_t + slot % K * stride_k;
        return raw_at(at);
    }

    __device__ long long id(Raw r) const {
        return wide ? static_cast<long long>(r.high) << 32 | static_cast<unsigned>(r.low) : r.low;
    }

    __device__ long long id(unsigned slot) const { return id(raw(slot)); }

    // -1 where the id is -1, out of range or remote. The map is never read outside its bounds.
    __device__ int local_of(long long id) const {
        if (id < 0 || id >= num_experts) return -1;
        if (expert_map == nullptr) return static_cast<int>(id);
        const int local = expert_map[id];
        return local >= 0 && local < num_local ? local : -1;
    }

    __device__ int local(unsigned slot) const { return local_of(id(slot)); }

    // The local expert of each id; in sweeps, so that no load waits for another.
    template <int N> __device__ void locals_of(const Raw (&r)[N], int (&local)[N]) const {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const long long own = id(r[j]);
            local[j] = own < 0 || own >= num_experts ? -1 : static_cast<int>(own);
        }
        if (expert_map == nullptr) return;
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (local[j] >= 0) local[j] = expert_map[local[j]];
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (local[j] >= num_local) local[j] = -1;
    }

    // local[j] of slot first + j * step where that is below `end`, negative elsewhere.
    template <int N> __device__ void locals(int first, int step, int end, int (&local)[N]) const {
        Raw r[N];
#pragma unroll
        for (int j = 0; j < N; ++j) r[j] = {-1, -1};
        if (flat()) {
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (first + j * step < end) r[j] = raw_at(first + j * step);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (first + j * step < end) r[j] = raw(first + j * step);
        }
        locals_of(r, local);
    }
};

}  // namespace moeproof

// The arguments of Slots in a stage's signature, and the struct made of them.
#define SLOT_PARAMETERS                                                                                              \
    const void *ids, int wide, const int *expert_map, long long stride_t, long long stride_k, int num_experts, \
        int num_local, unsigned K
#define SLOT_VALUES {ids, wide, expert_map, stride_t, stride_k, num_experts, num_local, K}
