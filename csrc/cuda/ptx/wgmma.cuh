// Products of tiles in shared memory by a warpgroup, four warps of which the first is a multiple of four (sm_90a
// alone): wgmma.mma_async. The sums are in registers: with w the warp in its group, g = lane / 4 and t = lane % 4,
//   sums[4j + 2h + c] is row 16w + g + 8h, column 8j + 2t + c.
// A product runs by itself: its registers may not be touched between the product and the wait for its group, and a
// fence stands between other work on registers and the first product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"

#ifdef REP_FAST_CUDA_ON_CPU
#include <algorithm>
#include <any>
#include <cstring>
#include <map>
#include <vector>
#endif

namespace rep_fast::cuda::ptx {

// Whether this is code for sm_90a, the only one that has these instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(REP_FAST_CUDA_ON_CPU)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

// How wgmma finds a matrix: rows of 128 bytes as `copy_box` leaves them, of which it takes 32. Groups of eight rows lie
// 1024 bytes apart. The next columns begin 32 bytes on: the swizzle is one of addresses.
//   bits 0–13 address / 16; 16–29 leading offset / 16, without meaning here; 32–45 offset of the next eight rows / 16;
//   62–63 the swizzle, 1 for 128 bytes.
inline constexpr std::uint64_t kEightRowsOn = 8 * kBoxRowBytes;
inline constexpr std::uint32_t kProductBytes = 32;  // of a row, in one product
__host__ __device__ constexpr std::uint64_t matrix_at(std::uint32_t shared_address) {
    return (shared_address & 0x3ffffu) >> 4 | std::uint64_t{1} << 16 | (kEightRowsOn >> 4) << 32 |
           std::uint64_t{1} << 62;
}

#ifdef REP_FAST_CUDA_ON_CPU

namespace detail {

struct HiddenSums {
    std::vector<std::uint32_t> words;  // the registers' bits
    int n_products = 0;                // under way
};
struct WarpgroupNotes {
    std::map<void*, HiddenSums> hidden;  // by registers
    bool is_fenced = false;
    std::uint64_t matrices = 0;  // a mark of all that were named so far
};

inline WarpgroupNotes& warpgroup_notes() {
    std::any& notes = cuda_on_cpu::notes();
    if (!notes.has_value()) {
        notes = WarpgroupNotes{};
    }
    return *std::any_cast<WarpgroupNotes>(&notes);
}

// What the elements are, and what is left of an exact sum.
struct OfBFloat16 {
    using Element = BFloat16;
    using Sum = float;
    static constexpr std::uint32_t kHidden = 0x7fc00000;  // NaN
    static double widened(BFloat16 value) { return static_cast<double>(to_float(value)); }
    static float kept(double sum) { return cut_off(sum); }
};

// The columns of a row that a product takes of the matrix its descriptor names.
template <class Of, std::size_t kColumns>
void read_row(std::uint64_t descriptor, unsigned row, double (&columns)[kColumns]) {
    using Element = typename Of::Element;
    if (descriptor >> 62 != 1) {
        throw cuda_on_cpu::ExecutionError("wgmma: only the 128-byte swizzle is modelled");
    }
    const auto begin = static_cast<std::uint32_t>(descriptor & 0x3fffu) << 4;
    const auto eight_rows = static_cast<std::uint32_t>(descriptor >> 32 & 0x3fffu) << 4;
    const std::uint32_t linear = begin + row / 8 * eight_rows + row % 8 * kBoxRowBytes;
    for (std::uint32_t k = 0; k < kColumns; ++k) {
        const std::uint32_t offset = k * static_cast<std::uint32_t>(sizeof(Element));
        columns[k] = Of::widened(*reinterpret_cast<const Element*>(cuda_on_cpu::shared_at(swizzled(linear + offset))));
    }
}

// Operands with k along their rows; `wgmma_transposed.cuh` has the others.
struct AlongRows {
    template <class Of, std::size_t kColumns>
    static void read(std::uint64_t descriptor, unsigned row, double (&columns)[kColumns]) {
        read_row<Of>(descriptor, row, columns);
    }
};

template <class Of, class Layout>
void multiply_rows(std::vector<std::uint32_t>& words, std::uint64_t a, std::uint64_t b, bool accumulates) {
    using Sum = typename Of::Sum;
    constexpr std::size_t kDepth = kProductBytes / sizeof(typename Of::Element);
    const unsigned thread = cuda_on_cpu::thread_index().x;
    const unsigned warp = thread / 32 % 4, g = thread % 32 / 4, t = thread % 4;
    double rows[2][kDepth], column[kDepth];
    Layout::template read<Of>(a, 16 * warp + g, rows[0]);
    Layout::template read<Of>(a, 16 * warp + g + 8, rows[1]);
    for (unsigned j = 0; j < words.size() / 4; ++j) {
        for (unsigned c = 0; c < 2; ++c) {
            Layout::template read<Of>(b, 8 * j + 2 * t + c, column);
            for (unsigned h = 0; h < 2; ++h) {
                std::uint32_t& word = words[4 * j + 2 * h + c];
                double sum = accumulates ? static_cast<double>(cuda_on_cpu::from_word<Sum>(word)) : 0.0;
                for (std::size_t k = 0; k < kDepth; ++k) {
                    sum += rows[h][k] * column[k];
                }
                word = static_cast<std::uint32_t>(cuda_on_cpu::as_word(Of::kept(sum)));
            }
        }
    }
}

// The registers hold nothing of use until the product has been waited for.
template <class Of, class Layout = AlongRows, int kCount>
void multiply_later(typename Of::Sum (&sums)[kCount], std::uint64_t a, std::uint64_t b, bool accumulates) {
    WarpgroupNotes& notes = warpgroup_notes();
    if (!notes.hidden.contains(sums)) {
        if (!notes.is_fenced) {
            throw cuda_on_cpu::ExecutionError("wgmma: no wgmma.fence before the first product on these registers");
        }
        std::vector<std::uint32_t>& words = notes.hidden[sums].words;
        words.resize(kCount);
        std::memcpy(words.data(), sums, sizeof(sums));
    }
    notes.hidden[sums].n_products += 1;
    notes.matrices = notes.matrices * 31 + a * 3 + b * 2 + (accumulates ? 1 : 0);
    std::fill(sums, sums + kCount, cuda_on_cpu::from_word<typename Of::Sum>(Of::kHidden));
    cuda_on_cpu::work_later([&notes, registers = &sums[0], a, b, accumulates] {
        HiddenSums& hidden = notes.hidden[registers];
        multiply_rows<Of, Layout>(hidden.words, a, b, accumulates);
        if (--hidden.n_products == 0) {
            std::memcpy(registers, hidden.words.data(), kCount * sizeof(std::uint32_t));
            notes.hidden.erase(registers);
        }
    });
}

}  // namespace detail

inline std::uint32_t shared_address(const void* shared) {
    return cuda_on_cpu::shared_offset(shared);
}
inline void wgmma_fence() {
    detail::warpgroup_notes().is_fenced = true;
}
inline void wgmma_m64n128k16(float (&sums)[64], std::uint64_t a, std::uint64_t b, bool accumulates) {
    detail::multiply_later<detail::OfBFloat16>(sums, a, b, accumulates);
}
inline void wgmma_m64n256k16(float (&sums)[128], std::uint64_t a, std::uint64_t b, bool accumulates) {
    detail::multiply_later<detail::OfBFloat16>(sums, a, b, accumulates);
}
inline void wgmma_commit() {
    const std::uint64_t mine = detail::warpgroup_notes().matrices;
    for (const std::uint64_t other : cuda_on_cpu::exchange(0xffffffffu, mine)) {
        if (other != mine) {
            throw cuda_on_cpu::ExecutionError("wgmma: the lanes of a warp name different matrices");
        }
    }
    cuda_on_cpu::commit_work();
}
template <int kPending, class Sum, int kCount>
void wgmma_wait(Sum (&)[kCount]) {
    cuda_on_cpu::wait_for_work(kPending);
    detail::warpgroup_notes().is_fenced = false;
}

#else

__device__ inline std::uint32_t shared_address(const void* shared) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// wgmma.fence.sync.aligned: products that follow see what was done to registers before.
__device__ inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16: sums = a bᵀ, or += where it accumulates; both operands have k
// along their rows. Products exact, sums in float32 in an order and with a rounding of the device's own.
__device__ inline void wgmma_m64n128k16(float (&sums)[64], std::uint64_t a, std::uint64_t b, bool accumulates) {
    asm volatile(
        "{\n"
        ".reg .pred accumulates;\n"
        "setp.ne.b32 accumulates, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, accumulates, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]),
          "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]), "+f"(sums[12]), "+f"(sums[13]),
          "+f"(sums[14]), "+f"(sums[15]), "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]),
          "+f"(sums[20]), "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23]), "+f"(sums[24]), "+f"(sums[25]),
          "+f"(sums[26]), "+f"(sums[27]), "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31]),
          "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]), "+f"(sums[35]), "+f"(sums[36]), "+f"(sums[37]),
          "+f"(sums[38]), "+f"(sums[39]), "+f"(sums[40]), "+f"(sums[41]), "+f"(sums[42]), "+f"(sums[43]),
          "+f"(sums[44]), "+f"(sums[45]), "+f"(sums[46]), "+f"(sums[47]), "+f"(sums[48]), "+f"(sums[49]),
          "+f"(sums[50]), "+f"(sums[51]), "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]), "+f"(sums[55]),
          "+f"(sums[56]), "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59]), "+f"(sums[60]), "+f"(sums[61]),
          "+f"(sums[62]), "+f"(sums[63])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)));
}
// The same with 256 columns.
__device__ inline void wgmma_m64n256k16(float (&sums)[128], std::uint64_t a, std::uint64_t b, bool accumulates) {
    asm volatile(
        "{\n"
        ".reg .pred accumulates;\n"
        "setp.ne.b32 accumulates, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, accumulates, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]),
          "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]), "+f"(sums[12]), "+f"(sums[13]),
          "+f"(sums[14]), "+f"(sums[15]), "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]),
          "+f"(sums[20]), "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23]), "+f"(sums[24]), "+f"(sums[25]),
          "+f"(sums[26]), "+f"(sums[27]), "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31]),
          "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]), "+f"(sums[35]), "+f"(sums[36]), "+f"(sums[37]),
          "+f"(sums[38]), "+f"(sums[39]), "+f"(sums[40]), "+f"(sums[41]), "+f"(sums[42]), "+f"(sums[43]),
          "+f"(sums[44]), "+f"(sums[45]), "+f"(sums[46]), "+f"(sums[47]), "+f"(sums[48]), "+f"(sums[49]),
          "+f"(sums[50]), "+f"(sums[51]), "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]), "+f"(sums[55]),
          "+f"(sums[56]), "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59]), "+f"(sums[60]), "+f"(sums[61]),
          "+f"(sums[62]), "+f"(sums[63]), "+f"(sums[64]), "+f"(sums[65]), "+f"(sums[66]), "+f"(sums[67]),
          "+f"(sums[68]), "+f"(sums[69]), "+f"(sums[70]), "+f"(sums[71]), "+f"(sums[72]), "+f"(sums[73]),
          "+f"(sums[74]), "+f"(sums[75]), "+f"(sums[76]), "+f"(sums[77]), "+f"(sums[78]), "+f"(sums[79]),
          "+f"(sums[80]), "+f"(sums[81]), "+f"(sums[82]), "+f"(sums[83]), "+f"(sums[84]), "+f"(sums[85]),
          "+f"(sums[86]), "+f"(sums[87]), "+f"(sums[88]), "+f"(sums[89]), "+f"(sums[90]), "+f"(sums[91]),
          "+f"(sums[92]), "+f"(sums[93]), "+f"(sums[94]), "+f"(sums[95]), "+f"(sums[96]), "+f"(sums[97]),
          "+f"(sums[98]), "+f"(sums[99]), "+f"(sums[100]), "+f"(sums[101]), "+f"(sums[102]), "+f"(sums[103]),
          "+f"(sums[104]), "+f"(sums[105]), "+f"(sums[106]), "+f"(sums[107]), "+f"(sums[108]), "+f"(sums[109]),
          "+f"(sums[110]), "+f"(sums[111]), "+f"(sums[112]), "+f"(sums[113]), "+f"(sums[114]), "+f"(sums[115]),
          "+f"(sums[116]), "+f"(sums[117]), "+f"(sums[118]), "+f"(sums[119]), "+f"(sums[120]), "+f"(sums[121]),
          "+f"(sums[122]), "+f"(sums[123]), "+f"(sums[124]), "+f"(sums[125]), "+f"(sums[126]), "+f"(sums[127])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)));
}

// wgmma.commit_group.sync.aligned: the products since the last one become a group.
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group.sync.aligned kPending: all groups but the kPending youngest are done. `sums` are named so that the
// compiler moves no use of them across.
template <int kPending, class Sum, int kCount>
__device__ inline void wgmma_wait(Sum (&sums)[kCount]) {
    static_assert(sizeof(Sum) == 4, "one register each");
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
    for (Sum& sum : sums) {
        if constexpr (std::is_same_v<Sum, float>) {
            asm volatile("" : "+f"(sum)::"memory");
        } else {
            asm volatile("" : "+r"(sum)::"memory");
        }
    }
}

#endif

}  // namespace rep_fast::cuda::ptx
