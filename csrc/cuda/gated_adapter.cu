// Gates and projections of gated_adapter, for every architecture.
//
// A block of the first launch owns 8 (one token) or 4 hidden rows of one adapter: its 8 warps read those rows once, 16
// bytes a lane, against up to 8 keys, which come from L1 and L2, as the rows do for the next 8 keys. The last block of
// an adapter adds the shares of its rows in their order, the last of all says whose turn it is: logits do not depend on
// the schedule. A projection reads A and B once per open token.
// Bytes: 2 or 4·H·M per adapter, once; keys and outputs 2·T·M each. Limit: memory up to about 8 tokens.
// Registers: 116 to 191 for the gates (nvcc 13.0), none spilled, as long as one block per processor is all that is
// asked for. Occupancy, time: not measured yet on a device.
#include <cuda_runtime.h>

#include <algorithm>

#include "core/error.h"
#include "cuda/gated_adapter.h"
#include "cuda/gated_adapter_steps.cuh"
#include "cuda/launch.cuh"

namespace rep_fast::cuda {
namespace {

// Blocks of a launch that mostly has nothing to do: enough for the memory, few enough to be over at once.
constexpr unsigned kProjectionBlocks = 256;
// Times a token can move by whole launches; whoever moves more often is finished by one block.
constexpr int kRounds = 2;
constexpr std::int64_t kAlignment = 256;

// True in the last of `n_blocks` blocks that ask, which then sees what the others wrote.
__device__ inline bool is_last_block(int* ticket, int n_blocks, int& is_last) {
    __syncthreads();  // what this block wrote is there
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(ticket, 1) == n_blocks - 1 ? 1 : 0;
        if (is_last != 0) {
            *ticket = 0;
        }
        __threadfence();
    }
    __syncthreads();
    return is_last != 0;
}

__device__ inline int tiles_of(const GateWork& work, int adapter) {
    const int end = adapter + 1 < work.n_adapters ? entry_of(work, adapter + 1).first_tile : work.n_tiles;
    return end - entry_of(work, adapter).first_tile;
}

__device__ inline std::int64_t warp_of_grid() {
    // neighbours in number lie in different blocks: little work is spread over many
    return static_cast<std::int64_t>(threadIdx.x / kLanes) * gridDim.x + blockIdx.x;
}
__device__ inline std::int64_t warps_of_grid() {
    return static_cast<std::int64_t>(kGateWarps) * gridDim.x;
}

// `adapted` is there where the gates decide for the first time, and gets the keys.
template <int kTokens, int kRows, class Key, class Weight>
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_kernel(const __grid_constant__ GateWork work, KeyRows<Key> keys, Key* adapted) {
    auto& shared = shared_as<GateShared>();
    const bool renews = adapted == nullptr;
    const int tile = static_cast<int>(blockIdx.x);
    const int adapter = adapter_of_tile(work, tile);
    if (!renews) {
        const std::int64_t n = work.n_tokens * work.key_dim;
        const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
        for (std::int64_t i = thread; i < n; i += static_cast<std::int64_t>(gridDim.x) * kGateThreads) {
            adapted[i] = keys.data[i / work.key_dim * keys.row_stride + i % work.key_dim];
        }
    }
    gate_tile<kTokens, kRows, Key, Weight>(work, keys, shared, adapter, tile, renews);
    const int n_tiles = tiles_of(work, adapter);
    if (!is_last_block(work.tickets + adapter, n_tiles, shared.is_last)) {
        return;
    }
    settle_gate<Weight>(work, adapter, n_tiles, renews);
    if (is_last_block(work.tickets + work.n_adapters, work.n_adapters, shared.is_last)) {
        choose_acting(work, !renews);
    }
}

__global__ void __launch_bounds__(kGateThreads) choose_kernel(const __grid_constant__ GateWork work, bool is_first) {
    choose_acting(work, is_first);
}

template <class Weight>
__global__ void __launch_bounds__(kGateThreads) inner_kernel(const __grid_constant__ GateWork work, AnyRows keys) {
    project_inner<Weight>(work, keys, warp_of_grid(), warps_of_grid());
}

template <class Weight>
__global__ void __launch_bounds__(kGateThreads, 1)
    outer_kernel(const __grid_constant__ GateWork work, AnyRows bases, void* adapted, DType dtype) {
    project_outer<Weight>(work, bases, adapted, dtype, warp_of_grid(), warps_of_grid());
}

// One block does whatever is left. `keys` are what the adapters see: `values` where they are chained, else the native
// keys.
template <int kTokens, int kRows, class Weight>
__global__ void __launch_bounds__(kGateThreads) finish_kernel(const __grid_constant__ GateWork work, AnyRows keys,
                                                              KeyRows<float> values, void* adapted, DType dtype) {
    auto& shared = shared_as<GateShared>();
    const std::int64_t warp = threadIdx.x / kLanes;
    while (true) {
        int n_acting = 0;
        for (std::int64_t token = threadIdx.x; token < work.n_tokens; token += kGateThreads) {
            n_acting += work.acting[token] >= 0 ? 1 : 0;
        }
        if (__syncthreads_or(n_acting) == 0) {
            return;
        }
        project_inner<Weight>(work, keys, warp, kGateWarps);
        __syncthreads();
        project_outer<Weight>(work, {values.data, DType::kFloat32, values.row_stride}, adapted, dtype, warp,
                              kGateWarps);
        __syncthreads();
        if (work.composition == Composition::kChain) {
            for (int tile = 0; tile < work.n_tiles; ++tile) {
                gate_tile<kTokens, kRows, float, Weight>(work, values, shared, adapter_of_tile(work, tile), tile, true);
            }
            __syncthreads();
            for (int adapter = 0; adapter < work.n_adapters; ++adapter) {
                settle_gate<Weight>(work, adapter, tiles_of(work, adapter), true);
            }
            __syncthreads();
        }
        choose_acting(work, false);
        __syncthreads();
    }
}

struct SomeEntries {
    GateEntry entries[kFewAdapters];
};

__global__ void store_entries_kernel(const __grid_constant__ SomeEntries some, GateEntry* entries, int n) {
    if (static_cast<int>(threadIdx.x) < n) {
        entries[threadIdx.x] = some.entries[threadIdx.x];
    }
}

// ---- host ---------------------------------------------------------------------------------------------------------

struct GateTile {
    int tokens, rows;
};

constexpr GateTile kOneToken = {1, 8}, kManyTokens = {8, 4};

GateTile gate_tile_of(std::int64_t n_tokens) {
    return n_tokens == 1 ? kOneToken : kManyTokens;
}

std::int64_t element_bytes(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

bool moves_twice(const GatedAdapterCall& call) {
    return call.adapters.size() > 1 && call.composition != Composition::kArgmax;
}

// Cuts scratch into pieces; with a null base it only measures.
class Pieces {
  public:
    explicit Pieces(void* base) : base_(static_cast<unsigned char*>(base)) {}

    template <class T>
    T* take(std::int64_t n) {
        const std::int64_t begin = used_;
        used_ += (n * static_cast<std::int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
    }
    [[nodiscard]] std::int64_t used() const { return used_; }

  private:
    unsigned char* base_;
    std::int64_t used_ = 0;
};

GateEntry entry_for(const AdapterOnDevice& adapter, DType dtype, int first_tile) {
    return {adapter, first_tile, allows_sixteen_bytes(adapter.w1, adapter.w1_stride, element_bytes(dtype))};
}

int count_tiles(const AdapterOnDevice& adapter, GateTile tile) {
    return (adapter.n_hidden + tile.rows - 1) / tile.rows;
}

struct Plan {
    GateWork work;
    GateEntry* stored = nullptr;
    std::int64_t bytes = 0;
};

Plan plan_of(const GatedAdapterCall& call) {
    const GateTile tile = gate_tile_of(call.n_tokens);
    const auto n_adapters = std::ssize(call.adapters);
    Plan plan;
    GateWork& work = plan.work;
    work.n_adapters = static_cast<std::int32_t>(n_adapters);
    for (const AdapterOnDevice& adapter : call.adapters) {
        work.n_tiles += count_tiles(adapter, tile);
        work.max_rank = std::max(work.max_rank, adapter.rank);
    }
    work.composition = call.composition;
    work.n_tokens = call.n_tokens;
    work.key_dim = call.key_dim;
    work.logits = call.logits;
    work.opened = call.opened;
    work.tickets = call.tickets;
    Pieces pieces(call.scratch);
    work.partial = pieces.take<float>(call.n_tokens * work.n_tiles);
    work.acting = pieces.take<int>(call.n_tokens);
    work.inner = pieces.take<float>(call.n_tokens * work.max_rank);
    plan.stored = pieces.take<GateEntry>(n_adapters > kFewAdapters ? n_adapters : 0);
    if (moves_twice(call)) {
        work.values = call.key_dtype == DType::kFloat32 ? static_cast<float*>(call.adapted)
                                                        : pieces.take<float>(call.n_tokens * call.key_dim);
    }
    plan.bytes = pieces.used();
    return plan;
}

void fill_entries(Plan& plan, const GatedAdapterCall& call, cudaStream_t stream) {
    const GateTile tile = gate_tile_of(call.n_tokens);
    const auto n_adapters = std::ssize(call.adapters);
    int first_tile = 0;
    for (std::int64_t first = 0; first < n_adapters; first += kFewAdapters) {
        const auto n = static_cast<int>(std::min<std::int64_t>(kFewAdapters, n_adapters - first));
        SomeEntries some;
        for (int i = 0; i < n; ++i) {
            const AdapterOnDevice& adapter = call.adapters[static_cast<std::size_t>(first + i)];
            some.entries[i] = entry_for(adapter, call.weight_dtype, first_tile);
            first_tile += count_tiles(adapter, tile);
        }
        if (n_adapters <= kFewAdapters) {
            std::copy_n(some.entries, n, plan.work.few);
            return;
        }
        launch("store_entries", store_entries_kernel, {dim3(1), dim3(kFewAdapters), 0, stream}, some,
               plan.stored + first, n);
    }
    plan.work.many = plan.stored;
}

// The launches of one call.
template <class Weight>
struct Launches {
    const Plan& plan;
    const GatedAdapterCall& call;
    KeyRows<float> values;
    cudaStream_t stream;

    // use(kTokens, kRows) as constants.
    template <class Use>
    void with_tile(const Use& use) const {
        if (call.n_tokens == 1) {
            use.template operator()<kOneToken.tokens, kOneToken.rows>();
        } else {
            use.template operator()<kManyTokens.tokens, kManyTokens.rows>();
        }
    }

    [[nodiscard]] LaunchShape shape(std::int64_t n_blocks) const {
        return {dim3(static_cast<unsigned>(n_blocks)), dim3(kGateThreads), sizeof(GateShared), stream};
    }

    template <class Key>
    void decide() const {
        const auto* data = static_cast<const Key*>(call.keys);
        const KeyRows<Key> keys = {data, call.row_stride, allows_sixteen_bytes(data, call.row_stride, sizeof(Key))};
        with_tile([&]<int kTokens, int kRows>() {
            launch("gate", gate_kernel<kTokens, kRows, Key, Weight>, shape(plan.work.n_tiles), plan.work, keys,
                   static_cast<Key*>(call.adapted));
        });
    }

    void decide_again() const {
        with_tile([&]<int kTokens, int kRows>() {
            launch("renew_gates", gate_kernel<kTokens, kRows, float, Weight>, shape(plan.work.n_tiles), plan.work,
                   values, nullptr);
        });
    }

    void choose(bool is_first) const { launch("choose_acting", choose_kernel, shape(1), plan.work, is_first); }

    // The keys that adapters see, and those their projections are added to.
    [[nodiscard]] AnyRows native() const { return {call.keys, call.key_dtype, call.row_stride}; }
    [[nodiscard]] AnyRows moved() const { return {values.data, DType::kFloat32, values.row_stride}; }
    [[nodiscard]] AnyRows seen(bool is_first) const {
        return is_first || call.composition == Composition::kSum ? native() : moved();
    }

    void project(bool is_first) const {
        const LaunchShape blocks = shape(kProjectionBlocks);
        launch("project_inner", inner_kernel<Weight>, blocks, plan.work, seen(is_first));
        launch("project_outer", outer_kernel<Weight>, blocks, plan.work, is_first ? native() : moved(), call.adapted,
               call.key_dtype);
    }

    void finish() const {
        with_tile([&]<int kTokens, int kRows>() {
            launch("finish_gates", finish_kernel<kTokens, kRows, Weight>, shape(1), plan.work, seen(false), values,
                   call.adapted, call.key_dtype);
        });
    }

    void apply() const {
        const int n_moves = call.composition == Composition::kArgmax ? 1 : plan.work.n_adapters;
        for (int round = 0; round < std::min(n_moves, kRounds); ++round) {
            project(round == 0);
            if (round + 1 == n_moves) {
                return;
            }
            if (call.composition == Composition::kChain) {
                decide_again();
            } else {
                choose(false);
            }
        }
        finish();
    }
};

template <class Weight>
void decide_gates(const Launches<Weight>& launches) {
    switch (launches.call.key_dtype) {
        case DType::kFloat32:
            return launches.template decide<float>();
        case DType::kBFloat16:
            return launches.template decide<BFloat16>();
        default:
            return launches.template decide<Float16>();
    }
}

template <class Weight>
void run_typed(const GatedAdapterCall& call, const Plan& plan, bool decides, cudaStream_t stream) {
    const Launches<Weight> launches{
        plan,
        call,
        {plan.work.values, call.key_dim, allows_sixteen_bytes(plan.work.values, call.key_dim, sizeof(float))},
        stream};
    if (decides) {
        decide_gates(launches);
    } else {
        launches.choose(true);
    }
    launches.apply();
}

void check_weight_dtype(DType dtype) {
    REP_FAST_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                   "weights must be float32 or bfloat16, got " << dtype_name(dtype));
}

void check_call(const GatedAdapterCall& call) {
    REP_FAST_CHECK(!call.adapters.empty(), "no adapter given; pass at least one");
    check_weight_dtype(call.weight_dtype);
    REP_FAST_CHECK(
        call.key_dtype == DType::kFloat32 || call.key_dtype == DType::kBFloat16 || call.key_dtype == DType::kFloat16,
        "keys must be float32, bfloat16 or float16, got " << dtype_name(call.key_dtype));
    for (const AdapterOnDevice& adapter : call.adapters) {
        REP_FAST_CHECK(adapter.n_hidden >= 1 && adapter.rank >= 1,
                       "an adapter needs hidden rows and a rank, got " << adapter.n_hidden << " and " << adapter.rank);
    }
}

void run(const GatedAdapterCall& call, bool decides, void* stream) {
    check_call(call);
    if (call.n_tokens == 0) {
        return;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    Plan plan = plan_of(call);
    fill_entries(plan, call, on);
    if (call.weight_dtype == DType::kFloat32) {
        return run_typed<float>(call, plan, decides, on);
    }
    return run_typed<BFloat16>(call, plan, decides, on);
}

}  // namespace

std::size_t scratch_bytes(const GatedAdapterCall& call) {
    GatedAdapterCall measured = call;
    measured.scratch = nullptr;
    return static_cast<std::size_t>(plan_of(measured).bytes);
}

void gated_adapter(const GatedAdapterCall& call, void* stream) {
    run(call, true, stream);
}

void apply_open(const GatedAdapterCall& call, void* stream) {
    run(call, false, stream);
}

}  // namespace rep_fast::cuda
