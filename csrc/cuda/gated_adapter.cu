// Gates and projections of gated_adapter in one launch, for every architecture.
//
// The launch is cooperative: as many blocks as run at once, which wait for each other between its phases. A tile is 8
// (one token) or 4 hidden rows of one adapter; the 8 warps of a block read those rows once, 16 bytes a lane, against up
// to 8 keys, which come from L1 and L2, as the rows do for the next 8 keys. The block that ends an adapter's last tile
// adds the shares of its rows in their order, the one that ends the last adapter says whose turn it is: logits do not
// depend on the schedule. Where nobody's turn it is, all blocks leave. Else they project the tokens that are listed,
// reading A and B once per token, and where a token can move again its later gates decide anew, until nothing moves.
// Bytes: 2 or 4·H·M per adapter, once; keys and outputs 2·T·M each. Limit: memory up to about 8 tokens.
// Registers by ptxas 13.0: 120 to 128 at one token, two blocks of a multiprocessor, 230 to 236 at more; none spilled.
// Time: not measured yet on a device.
#include <cuda_runtime.h>

#include <algorithm>

#include "core/error.h"
#include "cuda/gated_adapter.h"
#include "cuda/gated_adapter_steps.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/counter.cuh"
#include "cuda/ptx/wide_access.cuh"

namespace rep_fast::cuda {
namespace {

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

// What this block has written is there for whoever waits for one more in `counter`.
__device__ inline void raise(int* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
    }
}

__device__ inline void wait_for_blocks(const int* counter, int value) {
    if (threadIdx.x == 0) {
        ptx::wait_until_reached(counter, value);
        __threadfence();
    }
    __syncthreads();
}

// Numbers that grow in the course of a launch and are zero at its end, behind the tickets of the adapters.
struct Progress {
    int* n_decided;  // times that one block has said whose turn it is
    int* n_arrived;  // blocks at a barrier, of all barriers
    int* n_left;     // blocks that are through
};

__device__ inline Progress progress_of(const GateWork& work) {
    int* const begin = work.tickets + work.n_adapters + 1;
    return {begin, begin + 1, begin + 2};
}
static_assert(kMoreTickets == 5, "the ticket of all adapters, the numbers of Progress, and those who act");

// The `number`-th barrier of all blocks.
__device__ inline void wait_for_all(const Progress& progress, int number) {
    raise(progress.n_arrived);
    wait_for_blocks(progress.n_arrived, number * static_cast<int>(gridDim.x));
}

__device__ inline void leave(const GateWork& work, const Progress& progress) {
    __syncthreads();  // nobody of this block waits or reads any more
    if (threadIdx.x == 0 && atomicAdd(progress.n_left, 1) == static_cast<int>(gridDim.x) - 1) {
        *progress.n_decided = 0;
        *progress.n_arrived = 0;
        *progress.n_left = 0;
        *work.n_acting = 0;
    }
}

// All gates decide, or those of tokens that moved; then it is said whose turn it is.
template <int kTokens, int kRows, class Weight, class Key>
__device__ inline void decide(const GateWork& work, const KeyRows<Key>& keys, GateShared& shared, bool renews) {
    for (int tile = static_cast<int>(blockIdx.x); tile < work.n_tiles; tile += static_cast<int>(gridDim.x)) {
        const int adapter = adapter_of_tile(work, tile), n_tiles = tiles_of(work, adapter);
        gate_tile<kTokens, kRows, Key, Weight>(work, keys, shared, adapter, tile, renews);
        if (!is_last_block(work.tickets + adapter, n_tiles, shared.is_last)) {
            continue;
        }
        settle_gate<Weight>(work, adapter, n_tiles, renews);
        if (is_last_block(work.tickets + work.n_adapters, work.n_adapters, shared.is_last)) {
            choose_acting_alone(work, !renews);
            raise(progress_of(work).n_decided);
        }
    }
}

// The keys before anybody moved them, row by row.
template <class Key>
__device__ inline void copy_keys(const GateWork& work, const KeyRows<Key>& keys, Key* adapted) {
    const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
    const std::int64_t n_threads = static_cast<std::int64_t>(gridDim.x) * kGateThreads;
    const bool is_wide = keys.sixteen_bytes && work.key_dim * static_cast<std::int64_t>(sizeof(Key)) % 16 == 0 &&
                         reinterpret_cast<std::uintptr_t>(adapted) % 16 == 0;
    for (std::int64_t token = 0; token < work.n_tokens; ++token) {
        const Key* const from = keys.data + token * keys.row_stride;
        Key* const to = adapted + token * work.key_dim;
        if (is_wide) {
            constexpr std::int64_t kOfPiece = 16 / sizeof(Key);
            for (std::int64_t piece = thread; piece < work.key_dim / kOfPiece; piece += n_threads) {
                ptx::store_16(to + piece * kOfPiece, ptx::load_16(from + piece * kOfPiece));
            }
        } else {
            for (std::int64_t column = thread; column < work.key_dim; column += n_threads) {
                to[column] = from[column];
            }
        }
    }
}

// One token's tile leaves registers for two blocks on a multiprocessor: else some of them would read twice as many rows
// as the others, one after the other.
template <int kTokens>
inline constexpr int kBlocksTogether = kTokens == 1 ? 2 : 1;

// `decides`: the gates of the native keys are decided here and `adapted` gets the keys; else both are done.
template <int kTokens, int kRows, class Key, class Weight>
__global__ void __launch_bounds__(kGateThreads, kBlocksTogether<kTokens>)
    gates_kernel(const __grid_constant__ GateWork work, KeyRows<Key> keys, KeyRows<float> values, Key* adapted,
                 bool decides) {
    auto& shared = shared_as<GateShared>();
    const Progress progress = progress_of(work);
    const bool is_chain = work.composition == Composition::kChain;
    const bool moves_once = work.values == nullptr;
    int n_said = 0, n_barriers = 0;
    if (decides) {
        copy_keys(work, keys, adapted);
        decide<kTokens, kRows, Weight>(work, keys, shared, false);
        wait_for_blocks(progress.n_decided, ++n_said);
    } else {
        const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
        choose_acting(work, true, thread, static_cast<std::int64_t>(gridDim.x) * kGateThreads);
        wait_for_all(progress, ++n_barriers);
    }
    for (bool is_first = true; *work.n_acting != 0; is_first = false) {
        // the gates of a chain see what earlier ones made of the key
        if (is_first || !is_chain) {
            project_inner<Weight>(work, keys, shared);
        } else {
            project_inner<Weight>(work, values, shared);
        }
        wait_for_all(progress, ++n_barriers);
        if (is_first) {
            project_outer<Weight>(work, keys, adapted, warp_of_grid(), warps_of_grid());
        } else {
            project_outer<Weight>(work, values, adapted, warp_of_grid(), warps_of_grid());
        }
        if (moves_once) {
            break;
        }
        wait_for_all(progress, ++n_barriers);
        if (is_chain) {
            decide<kTokens, kRows, Weight>(work, values, shared, true);
        } else if (blockIdx.x == 0) {
            choose_acting_alone(work, false);
            raise(progress.n_decided);
        }
        wait_for_blocks(progress.n_decided, ++n_said);
    }
    leave(work, progress);
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
    const std::int64_t size = element_bytes(dtype);
    return {adapter, first_tile, allows_sixteen_bytes(adapter.w1, adapter.w1_stride, size),
            allows_sixteen_bytes(adapter.a, adapter.a_stride, size)};
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
    work.listed = pieces.take<std::int64_t>(call.n_tokens);
    work.n_acting = call.tickets + n_adapters + kMoreTickets - 1;
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

template <int kTokens, int kRows, class Key, class Weight>
void launch_gates(const GatedAdapterCall& call, const GateWork& work, bool decides, cudaStream_t stream) {
    const auto* data = static_cast<const Key*>(call.keys);
    const KeyRows<Key> keys = {data, call.row_stride, allows_sixteen_bytes(data, call.row_stride, sizeof(Key))};
    const KeyRows<float> values = {work.values, call.key_dim,
                                   allows_sixteen_bytes(work.values, call.key_dim, sizeof(float))};
    const auto kernel = gates_kernel<kTokens, kRows, Key, Weight>;
    const int at_once = blocks_at_once(kernel, kGateThreads, sizeof(GateShared));
    const int n_blocks = decides ? std::min(work.n_tiles, at_once) : at_once;
    launch("gated_adapter", kernel,
           {.grid = dim3(static_cast<unsigned>(n_blocks)),
            .block = dim3(kGateThreads),
            .shared_bytes = sizeof(GateShared),
            .stream = stream,
            .is_cooperative = true},
           work, keys, values, static_cast<Key*>(call.adapted), decides);
}

template <class Key, class Weight>
void run_typed(const GatedAdapterCall& call, const GateWork& work, bool decides, cudaStream_t stream) {
    if (call.n_tokens == 1) {
        launch_gates<kOneToken.tokens, kOneToken.rows, Key, Weight>(call, work, decides, stream);
    } else {
        launch_gates<kManyTokens.tokens, kManyTokens.rows, Key, Weight>(call, work, decides, stream);
    }
}

template <class Weight>
void run_weights(const GatedAdapterCall& call, const GateWork& work, bool decides, cudaStream_t stream) {
    switch (call.key_dtype) {
        case DType::kFloat32:
            return run_typed<float, Weight>(call, work, decides, stream);
        case DType::kBFloat16:
            return run_typed<BFloat16, Weight>(call, work, decides, stream);
        default:
            return run_typed<Float16, Weight>(call, work, decides, stream);
    }
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
        return run_weights<float>(call, plan.work, decides, on);
    }
    return run_weights<BFloat16>(call, plan.work, decides, on);
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
