// CUDA's device vocabulary on the host: a block's threads are fibers, and every barrier and warp collective is a meeting.
//
// Just enough to run the stages without a GPU: results, barriers, shared memory, launch limits. Blocks run one after the
// other. Threads take turns in an order that changes from launch to launch, so that a missing barrier shows as a changed
// result; a thread that leaves while others wait for it, and a launch that a GPU would refuse, are errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorAssert = 710 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

namespace emulated {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 * 1024;
constexpr size_t USUAL_SHARED = 48 * 1024, MOST_SHARED = 99 * 1024;

struct Fiber {
    ucontext_t context;
    dim3 thread;
    unsigned number = 0;
    bool done = false;
    long waits_for = -1;  // generation of a meeting; -1 = runs
    int meeting = 0;      // its warp, or -1 for the block
};

// Threads that wait for each other. Everybody who has not left must come.
struct Meeting {
    long generation = 0;
    unsigned arrived = 0, members = 0;
    uint64_t values[2][WARP] = {};
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    std::vector<char> shared;
    ucontext_t scheduler;
    Fiber* now = nullptr;
    dim3 index, size, grid;
    std::function<void()> body;
    const char* failure = nullptr;
};

inline Block* block = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline size_t allowed_shared = USUAL_SHARED;
inline unsigned launches = 0;

inline void yield() { swapcontext(&block->now->context, &block->scheduler); }

// Wait until all members of the meeting are here.
inline void meet(Meeting& m, int which) {
    const long generation = m.generation;
    if (++m.arrived == m.members) {
        m.arrived = 0;
        ++m.generation;
        return;
    }
    block->now->meeting = which;
    block->now->waits_for = generation;
    while (m.generation == generation) yield();
    block->now->waits_for = -1;
}

// Every lane gives a value and sees all 32.
inline const uint64_t* exchange(uint64_t value) {
    const unsigned warp = block->now->number / WARP, lane = block->now->number % WARP;
    Meeting& m = block->warps[warp];
    uint64_t* values = m.values[m.generation % 2];
    values[lane] = value;
    meet(m, static_cast<int>(warp));
    return values;
}

inline void entry() {
    block->body();
    Fiber& self = *block->now;
    self.done = true;
    // Who leaves is waited for no more in the block; a warp collective names all 32 lanes, so there it is an error.
    Meeting& all = block->all;
    --all.members;
    if (all.members && all.arrived == all.members) {
        all.arrived = 0;
        ++all.generation;
    }
    swapcontext(&self.context, &block->scheduler);
}

inline void run_block(Block& b, std::vector<char>& stacks) {
    const unsigned count = b.size.x * b.size.y * b.size.z;
    b.fibers.assign(count, Fiber());
    b.warps.assign((count + WARP - 1) / WARP, Meeting());
    for (unsigned w = 0; w < b.warps.size(); ++w) b.warps[w].members = std::min(WARP, count - w * WARP);
    b.all = Meeting();
    b.all.members = count;
    std::memset(b.shared.data(), 0xA5, b.shared.size());
    for (unsigned i = 0; i < count; ++i) {
        Fiber& f = b.fibers[i];
        f.number = i;
        f.thread = dim3(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks.data() + i * STACK;
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, entry, 0);
    }
    // A different order each launch: up, down, and in strides.
    const unsigned strides[] = {1, count - 1, 7, 13};
    unsigned stride = strides[launches % 4];
    while (stride == 0 || std::__gcd(stride, count) != 1) ++stride;
    unsigned left = count;
    while (left) {
        bool moved = false;
        for (unsigned n = 0; n < count; ++n) {
            Fiber& f = b.fibers[static_cast<uint64_t>(n) * stride % count];
            if (f.done) continue;
            Meeting& m = f.meeting < 0 ? b.all : b.warps[f.meeting];
            if (f.waits_for >= 0 && m.generation == f.waits_for) continue;
            moved = true;
            b.now = &f;
            swapcontext(&b.scheduler, &f.context);
            if (f.done) --left;
        }
        if (!moved) {
            b.failure = "a thread left or took another branch while others of its warp or block wait for it";
            return;
        }
    }
}

template <typename Kernel> struct Launch {
    Kernel* kernel;
    dim3 grid, size;
    size_t shared;

    template <typename Argument, typename... Rest> void operator()(const Argument& first, const Rest&... rest) const {
        const uint64_t threads = uint64_t(size.x) * size.y * size.z;
        const bool possible = threads >= 1 && threads <= 1024 && grid.x >= 1 && grid.x < (1u << 31) && grid.y >= 1 &&
                              grid.y < 65536 && grid.z >= 1 && grid.z < 65536 && shared <= allowed_shared;
        allowed_shared = USUAL_SHARED;
        ++launches;
        if (!possible) {
            last_error = cudaErrorInvalidConfiguration;
            return;
        }
        Block b;
        std::vector<char> stacks(threads * STACK);
        b.shared.resize(shared + 16);
        b.size = size;
        b.grid = grid;
        b.body = [&] { kernel(first, rest...); };
        block = &b;
        for (unsigned y = 0; y < grid.y && !b.failure; ++y)
            for (unsigned x = 0; x < grid.x && !b.failure; ++x) {
                b.index = dim3(x, y, 0);
                run_block(b, stacks);
            }
        block = nullptr;
        if (b.failure) {
            std::fprintf(stderr, "emulated CUDA: %s\n", b.failure);
            last_error = cudaErrorAssert;
        }
    }
};

template <typename Kernel> Launch<Kernel> launch(Kernel* kernel, dim3 grid, dim3 size, size_t shared, cudaStream_t) {
    return {kernel, grid, size, shared};
}

}  // namespace emulated

#define threadIdx (emulated::block->now->thread)
#define blockIdx (emulated::block->index)
#define blockDim (emulated::block->size)
#define gridDim (emulated::block->grid)

inline void __syncthreads() { emulated::meet(emulated::block->all, -1); }
inline void __syncwarp() { emulated::exchange(0); }

inline unsigned lane_of_fiber() { return emulated::block->now->number % emulated::WARP; }

template <typename T> uint64_t raw_bits(T x) {
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    return bits;
}
template <typename T> T from_raw(uint64_t bits) {
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

template <typename T> T __shfl_sync(unsigned, T x, int lane) { return from_raw<T>(emulated::exchange(raw_bits(x))[lane % 32]); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) {
    const unsigned lane = lane_of_fiber();
    return from_raw<T>(emulated::exchange(raw_bits(x))[lane ^ mask]);
}
template <typename T> T __shfl_up_sync(unsigned, T x, int distance) {
    const int lane = static_cast<int>(lane_of_fiber());
    const uint64_t* all = emulated::exchange(raw_bits(x));
    return lane >= distance ? from_raw<T>(all[lane - distance]) : x;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    const uint64_t* all = emulated::exchange(x);
    return static_cast<unsigned>(*std::max_element(all, all + 32));
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
    const uint64_t* all = emulated::exchange(x);
    return static_cast<unsigned>(*std::min_element(all, all + 32));
}
inline unsigned __match_any_sync(unsigned, int x) {
    const uint64_t own = raw_bits(x), *all = emulated::exchange(own);
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= unsigned(all[i] == own) << i;
    return mask;
}
inline unsigned __ballot_sync(unsigned, bool x) {
    const uint64_t* all = emulated::exchange(x);
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= unsigned(all[i] != 0) << i;
    return mask;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
template <typename T> T atomicAdd(T* at, T x) {
    const T before = *at;
    *at += x;
    return before;
}

inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = uint64_t(y) << 32 | x;
    unsigned bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return bytes;
}
// min(a + b, c) of the signed halves of words.
inline unsigned __viaddmin_s16x2(unsigned a, unsigned b, unsigned c) {
    unsigned least = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const int16_t sum = static_cast<int16_t>((a >> shift) + (b >> shift)), other = static_cast<int16_t>(c >> shift);
        least |= unsigned(static_cast<uint16_t>(std::min(sum, other))) << shift;
    }
    return least;
}
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) int2 {
    int x, y;
};

inline unsigned __float_as_uint(float x) { return from_raw<unsigned>(raw_bits(x)); }
inline float __uint_as_float(unsigned x) { return from_raw<float>(x); }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    _Float16 value;
};
inline uint16_t __half_as_ushort(__half x) { return from_raw<uint16_t>(raw_bits(x)); }
inline __half __ushort_as_half(uint16_t x) { return from_raw<__half>(x); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return {x}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulated::last_error;
    emulated::last_error = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorAssert ? "threads wait for each other for ever" : "invalid argument or configuration";
}
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
    if (bytes > static_cast<int>(emulated::MOST_SHARED)) return cudaErrorInvalidValue;
    emulated::allowed_shared = static_cast<size_t>(bytes);
    return cudaSuccess;
}
