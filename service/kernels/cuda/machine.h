// What our kernels ask of the machine: PTX here, or its stand-in on a CPU (tests/kernels/machine_emulator.h), so that the
// very same kernels can be run and checked without a GPU. Needs no header of CUDA's.
#pragma once
#ifndef BF16  // activations and outputs are bfloat16, not float16
#define BF16 0
#endif
#if BF16
#define INPUTS ".bf16.bf16"
#define PAIR "bf16x2"
#else
#define INPUTS ".f16.f16"
#define PAIR "f16x2"
#endif
#ifdef __CUDACC__
#include <stdint.h>
#else
#include <cstdint>
#endif

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY extern __shared__ __align__(1024) char shared[];
#define GRID_CONSTANT const __grid_constant__

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE void stop() { asm volatile("trap;"); }

// copies into shared memory by threads ------------------------------------------------------------------------
DEVICE void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy8(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy4(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// warps -------------------------------------------------------------------------------------------------------
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32" INPUTS ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_halves(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {  // of float16, whatever the activations are
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void load_matrices(uint32_t* r, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrices_transposed(uint32_t* r, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE uint32_t transposed(uint32_t pair) {  // of an 8 x 8 matrix that a warp holds
    uint32_t v;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(pair));
    return v;
}
DEVICE void store_two_transposed(uint32_t address, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
DEVICE void store_matrices(uint32_t address, const uint32_t* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

// arithmetic on pairs of the activations' type --------------------------------------------------------------------
template <int TABLE>
DEVICE uint32_t look_up_at(uint32_t offset) {
    uint32_t v;
    asm("ld.shared.b32 %0, [%1 + %2];" : "=r"(v) : "r"(offset), "n"(TABLE));
    return v;
}
DEVICE uint32_t subtract(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn." PAIR " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {  // (word & mask) | bits
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word), "r"(mask), "r"(bits));
    return v;
}
DEVICE uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {  // of a where the mask has them, else of b
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(v) : "r"(a), "r"(b), "r"(mask));
    return v;
}
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
DEVICE uint32_t to_pair(float low, float high) {
    uint32_t v;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE float to_float(uint16_t bits) {  // of float16, whatever the activations are
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}

// other types, whatever the activations are -----------------------------------------------------------------------
DEVICE uint32_t to_halves(float low, float high) {
    uint32_t v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE uint32_t subtract_halves(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE void e4m3_to_halves(uint32_t& low, uint32_t& high, uint32_t codes) {  // two pairs
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}
DEVICE uint16_t to_e4m3(float low, float high) {  // within 448
    uint16_t v;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE uint16_t to_brain(float v) {  // bfloat16
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

// float32 ---------------------------------------------------------------------------------------------------------
DEVICE float fused(float a, float b, float c) {  // a * b + c, rounded once
    float v;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(v) : "f"(a), "f"(b), "f"(c));
    return v;
}
DEVICE float reciprocal(float v) {  // rounded
    asm("rcp.rn.f32 %0, %0;" : "+f"(v));
    return v;
}
DEVICE float quick_reciprocal(float v) {  // within an ulp; 0 of what is above 2^126
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}
DEVICE float power_of_2(float v) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}
DEVICE float inverse_root(float v) {
    asm("rsqrt.approx.f32 %0, %0;" : "+f"(v));
    return v;
}
DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }
DEVICE uint4 load_fresh16(const void* p) {  // of what a predecessor wrote: stays behind the wait for it
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEVICE uint4 load_global16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
DEVICE float load_global(const float* p) { return __ldg(p); }
DEVICE float load_number(const uint16_t* p) {  // of the activations' type
    const uint16_t bits = __ldg(p);
    return BF16 ? bits_to_float(uint32_t(bits) << 16) : to_float(bits);
}

// between launches, and between the blocks of one ----------------------------------------------------------------
// Programmatic dependent launch: from the first on, the next kernel's blocks may come wherever there is room for them;
// nothing a predecessor wrote, or still reads, may be touched before the second is over.
DEVICE void release_successor() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void await_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void store_partial(float* to, float4 v) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// Past the L1, which does not hear of other blocks' stores; zeros where it is not wanted.
DEVICE float4 load_partial(const float* from, bool is_wanted) {
    float4 v;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
        "mov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\nmov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;\n"
        "@p ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
        : "=&f"(v.x), "=&f"(v.y), "=&f"(v.z), "=&f"(v.w)
        : "l"(from), "r"(uint32_t(is_wanted))
        : "memory");
    return v;
}
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE uint32_t flag_value(const uint32_t* flag) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
    return v;
}
DEVICE void flag_publish(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
DEVICE void flag_await(const uint32_t* flag, uint32_t value) {  // ends the kernel where it would wait for ever
    for (int tries = 0; flag_value(flag) != value; tries++)
        if (tries > 20000000) stop();
}
// Named barriers: THREADS of a block, those that wait and those that only tell.
template <int NAME, int THREADS>
DEVICE void sync_named() {
    asm volatile("bar.sync %0, %1;" ::"n"(NAME), "n"(THREADS) : "memory");
}
template <int NAME, int THREADS>
DEVICE void arrive_named() {
    asm volatile("bar.arrive %0, %1;" ::"n"(NAME), "n"(THREADS) : "memory");
}

// A number in a workspace, between blocks: there or ABSENT. Words are written and read whole, each for itself.
constexpr uint32_t ABSENT = 0xffffffff;
DEVICE float present(float v) { return v == v ? v : __uint_as_float(0x7fffffff); }
DEVICE void part_give(float* to, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(present(v.x)), "f"(present(v.y)),
                 "f"(present(v.z)), "f"(present(v.w))
                 : "memory");
}
DEVICE float4 part_look(const float* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
DEVICE bool is_there(float4 v) {
    return __float_as_uint(v.x) != ABSENT && __float_as_uint(v.y) != ABSENT && __float_as_uint(v.z) != ABSENT &&
           __float_as_uint(v.w) != ABSENT;
}
DEVICE void part_take(float* from) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(from), "r"(ABSENT) : "memory");
}
DEVICE bool look_again(int& tries) {  // ends the kernel where it would look for ever
    if (++tries > 20000000) stop();
    return true;
}

// clusters ----------------------------------------------------------------------------------------------------
DEVICE void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// For those who only want to know that the others have begun: their barriers, if they are visible, can be used.
DEVICE void cluster_arrive_begun() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void store_remote(uint32_t address, int rank, float4 v) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(there), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
// Told to a barrier of the receiver's, which expects so many bytes: no fence, nobody waits for the whole cluster.
DEVICE void send_remote(uint32_t address, int rank, float4 v, uint32_t barrier) {
    asm volatile(
        "{\n.reg .b32 there, told;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\nmapa.shared::cluster.u32 told, %2, %1;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3,%4,%5,%6}, [told];\n}" ::"r"(address),
        "r"(rank), "r"(barrier), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}

// barriers in shared memory and the copy engine ------------------------------------------------------------------
DEVICE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {  // ends the kernel where it would wait for ever
    asm volatile(
        "{\n.reg .pred done;\n.reg .u32 tries;\nmov.u32 tries, 0;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\nadd.u32 tries, tries, 1;\nsetp.lt.u32 done, tries, 1000000;\n@done bra again;\ntrap;\nover:\n}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}
// What threads stored into shared memory comes before what the copy engine is asked to bring there from now on.
DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// L2: evict first, evict last, neither
constexpr uint64_t READ_ONCE = 0x12F0000000000000ull, KEEP = 0x14F0000000000000ull, NORMAL = 0x1000000000000000ull;
DEVICE void copy_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}
DEVICE void copy_box_to_many(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint16_t ranks,
                             uint64_t policy) {  // to the same place, and the same barrier, in each of `ranks`
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ranks), "l"(policy)
        : "memory");
}
DEVICE void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank)
        : "memory");
}
// Of a cluster of two blocks: `rank` 0 or 1.
DEVICE void arrive_in_pair(uint32_t barrier, int rank) { barrier_arrive_at(barrier, rank); }
DEVICE void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t policy) {
    copy_box_to_many(to, map, column, row, barrier, 3, policy);
}
DEVICE void prefetch_box(const TensorMap* map, int column, int row) {  // into the L2
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
template <int N>
DEVICE void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void registers_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// wgmma -------------------------------------------------------------------------------------------------------
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
DEVICE void hold(float& d) { asm volatile("" : "+f"(d)::"memory"); }  // reads of d stay behind the wait before this
DEVICE void hold(uint32_t& v) { asm volatile("" : "+r"(v)); }  // kept in a register, not computed anew
#else
#include "machine_emulator.h"
#endif

// In a cluster a 32-bit address of shared memory has the block's rank in its upper bits: whatever is handed to the copy
// engine, to barriers or to other blocks needs them. -> what an offset into the window is added to; dynamic shared
// memory is expected behind the system's 1024 bytes.
DEVICE uint32_t window_start(const char* shared) {
    const uint32_t address = shared_address(shared);
    if ((address & 0xffffff) != 1024) stop();
    return address - 1024;
}

// An operand of wgmma: rows of 64 halves (128 bytes) under the 128-byte swizzle, eight rows 1024 bytes apart.
DEVICE uint64_t descriptor(uint32_t address) {
    return (uint64_t(1) << 62) | (uint64_t(64) << 32) | (uint64_t(1) << 16) | ((address & 0x3ffff) >> 4);
}
