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

    // Slots number fewer than 2^31 (slots.py): one 32-bit division. Offsets do not fit 32 bits.
    __device__ long long id(unsigned slot) const {
        const long long at = slot / K * stride_t + slot % K * stride_k;
        return wide ? static_cast<const long long*>(ids)[at] : static_cast<const int*>(ids)[at];
    }

    // -1 where the id is -1, out of range or remote. The map is never read outside its bounds.
    __device__ int local_of(long long id) const {
        if (id < 0 || id >= num_experts) return -1;
        if (expert_map == nullptr) return static_cast<int>(id);
        const int local = expert_map[id];
        return local >= 0 && local < num_local ? local : -1;
    }

    __device__ int local(unsigned slot) const { return local_of(id(slot)); }
};

}  // namespace moeproof

// The arguments of Slots in a stage's signature, and the struct made of them.
#define SLOT_PARAMETERS                                                                                              \
    const void *ids, int wide, const int *expert_map, long long stride_t, long long stride_k, int num_experts, \
        int num_local, unsigned K
#define SLOT_VALUES {ids, wide, expert_map, stride_t, stride_k, num_experts, num_local, K}
