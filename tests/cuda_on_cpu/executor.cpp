#include "executor.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <sstream>

#include "fibers.h"

namespace cuda_on_cpu {

using namespace detail;

namespace {

constexpr std::size_t kSharedAlignment = 128;
constexpr std::size_t kSharedAlignmentOfHopper = 1024;  // what 128-byte swizzles need

std::mt19937_64 random_order{0};
Block* running = nullptr;

void go_on_with(Block& block, Fiber& fiber) {
    if (_setjmp(block.scheduler) != 0) {
        return;
    }
    if (fiber.has_begun) {
        _longjmp(fiber.resume, 1);
    }
    fiber.has_begun = true;
    setcontext(&fiber.context);
}

void back_to_scheduler(Block& block, Fiber& fiber) {
    if (_setjmp(fiber.resume) == 0) {
        _longjmp(block.scheduler, 1);
    }
}

void run_current_fiber() {
    Block& block = *running;
    Fiber& fiber = *block.current;
    try {
        (*block.body)();
        if (!fiber.open_copies.empty() || !fiber.committed_copies.empty()) {
            throw ExecutionError(block.kernel + ": a thread returned before its asynchronous copies were waited for");
        }
        if (!fiber.open_work.empty() || !fiber.committed_work.empty()) {
            throw ExecutionError(block.kernel + ": a thread returned before its asynchronous work was waited for");
        }
    } catch (...) {
        fiber.thrown = std::current_exception();
    }
    fiber.state = State::kDone;
    back_to_scheduler(block, fiber);
}

Fiber& fiber_at(const Block& block, std::size_t number) {
    return *(*block.fibers)[number];
}

// Lets go of a barrier that everybody has reached. Returns whether there was one.
bool release_block_barrier(Block& block) {
    bool is_anybody_waiting = false;
    for (std::size_t n = 0; n < block.n_threads; ++n) {
        const State state = fiber_at(block, n).state;
        if (state != State::kAtBlockBarrier && state != State::kDone) {
            return false;
        }
        is_anybody_waiting |= state == State::kAtBlockBarrier;
    }
    for (std::size_t n = 0; n < block.n_threads; ++n) {
        Fiber& fiber = fiber_at(block, n);
        fiber.state = fiber.state == State::kDone ? State::kDone : State::kReady;
    }
    block.open_vote = 1 - block.open_vote;
    block.votes[block.open_vote] = false;
    return is_anybody_waiting;
}

bool release_warp_barrier_of(const Block& block, const Fiber& waiting) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if ((waiting.mask >> lane & 1u) == 0) {
            continue;
        }
        const std::size_t number = std::size_t{waiting.warp()} * kWarpSize + lane;
        if (number >= block.n_threads) {
            return false;
        }
        const Fiber& other = fiber_at(block, number);
        if (other.state != State::kAtWarpBarrier || other.mask != waiting.mask) {
            return false;
        }
    }
    const unsigned mask = waiting.mask;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (mask >> lane & 1u) {
            fiber_at(block, std::size_t{waiting.warp()} * kWarpSize + lane).state = State::kReady;
        }
    }
    return true;
}

std::string describe_waiting(const Block& block) {
    std::ostringstream text;
    text << block.kernel << ", block (" << block.index.x << ", " << block.index.y << ", " << block.index.z
         << "): nobody can go on;";
    std::size_t shown = 0;
    for (std::size_t n = 0; n < block.n_threads && shown < 4; ++n) {
        const Fiber& fiber = fiber_at(block, n);
        if (fiber.state == State::kAtBlockBarrier) {
            text << " thread " << n << " waits at __syncthreads;";
            ++shown;
        } else if (fiber.state == State::kAtWarpBarrier) {
            text << " thread " << n << " waits at a warp operation with mask 0x" << std::hex << fiber.mask << std::dec
                 << ";";
            ++shown;
        } else if (fiber.state == State::kAtCondition) {
            text << " thread " << n << " waits for a condition;";
            ++shown;
        }
    }
    text << " others have returned or wait elsewhere";
    return text.str();
}

void prepare_fiber(Block& block, std::size_t number) {
    Fiber& fiber = fiber_at(block, number);
    fiber.number = static_cast<unsigned>(number);
    const unsigned width = block.block.x, height = block.block.y;
    fiber.index = Dim3(static_cast<unsigned>(number) % width, static_cast<unsigned>(number) / width % height,
                       static_cast<unsigned>(number) / (width * height));
    fiber.state = State::kReady;
    fiber.has_begun = false;
    fiber.open_copies.clear();
    fiber.committed_copies.clear();
    fiber.open_work.clear();
    fiber.committed_work.clear();
    fiber.notes.reset();
    fiber.thrown = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.begin();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_current_fiber, 0);
}

void begin_block(Block& block) {
    block.ready.clear();
    block.waiting.clear();
    block.events.clear();
    for (std::size_t n = 0; n < block.n_threads; ++n) {
        prepare_fiber(block, n);
        block.ready.push_back(n);
    }
    block.warp_slots.assign((block.n_threads + kWarpSize - 1) / kWarpSize, {});
}

void let_happen(Block& block, std::size_t place) {
    std::swap(block.events[place], block.events.back());
    const std::function<void()> happens = std::move(block.events.back().happens);
    block.events.pop_back();
    happens();
}

// Lets a thread go on whose condition holds. Returns whether it does.
bool wake(Block& block, std::size_t place) {
    Fiber& fiber = fiber_at(block, block.waiting[place]);
    if (!fiber.condition()) {
        return false;
    }
    fiber.state = State::kReady;
    block.ready.push_back(fiber.number);
    block.waiting[place] = block.waiting.back();
    block.waiting.pop_back();
    return true;
}

// When nobody is ready: lets go whose conditions hold, if need be after what the device still has to do.
bool pass_condition(Block& block) {
    while (!block.waiting.empty()) {
        for (std::size_t place = block.waiting.size(); place-- > 0;) {
            wake(block, place);
        }
        if (!block.ready.empty() || block.events.empty()) {
            return !block.ready.empty();
        }
        let_happen(block, draw(block.events.size()));
    }
    return false;
}

enum class Went { kOn, kNowhere, kToTheEnd };

// When nobody is ready: lets everybody pass a barrier, or finds that the block is done, or that another one may have to
// do something first.
Went pass_barrier(Block& block) {
    if (release_block_barrier(block)) {
        for (std::size_t n = 0; n < block.n_threads; ++n) {
            if (fiber_at(block, n).state == State::kReady) {
                block.ready.push_back(n);
            }
        }
        return Went::kOn;
    }
    if (!block.waiting.empty()) {
        return Went::kNowhere;
    }
    for (std::size_t n = 0; n < block.n_threads; ++n) {
        if (fiber_at(block, n).state != State::kDone) {
            throw ExecutionError(describe_waiting(block));
        }
    }
    if (!block.events.empty()) {
        throw ExecutionError(block.kernel + ": a block ended before its asynchronous copies had landed");
    }
    return Went::kToTheEnd;
}

// Now and then something happens, or a condition is looked at, though others could go on.
void stir(Block& block) {
    if (!block.events.empty() && draw(8) == 0) {
        const std::size_t place = draw(block.events.size());
        if (!block.events[place].is_late) {
            let_happen(block, place);
        }
    }
    if (!block.waiting.empty() && draw(4) == 0) {
        wake(block, draw(block.waiting.size()));
    }
}

// Runs one thread up to where it waits.
Went advance(Block& block) {
    stir(block);
    if (block.ready.empty() && !pass_condition(block)) {
        const Went went = pass_barrier(block);
        if (went != Went::kOn) {
            return went;
        }
    }
    const std::size_t place = random_order() % block.ready.size();
    Fiber& fiber = fiber_at(block, block.ready[place]);
    block.ready[place] = block.ready.back();
    block.ready.pop_back();
    running = &block;
    block.current = &fiber;
    go_on_with(block, fiber);
    block.current = nullptr;
    if (fiber.thrown) {
        std::rethrow_exception(fiber.thrown);
    }
    if (fiber.state == State::kAtCondition) {
        block.waiting.push_back(fiber.number);
    }
    if (fiber.state == State::kAtWarpBarrier && release_warp_barrier_of(block, fiber)) {
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
            if (fiber.mask >> lane & 1u) {
                block.ready.push_back(std::size_t{fiber.warp()} * kWarpSize + lane);
            }
        }
    }
    return Went::kOn;
}

// A place for a block: its shared memory and its threads' stacks, which are kept from launch to launch.
struct Resident {
    Block block;
    GuardedPages pages;

    // the end of what was asked for lies at the unreadable page, as near as the alignment of its begin allows
    Resident(std::size_t number, const std::string& kernel, Dim3 grid, Dim3 shape, std::size_t shared_bytes,
             const std::function<void()>& body, bool is_for_hopper)
        : pages(std::max<std::size_t>(shared_bytes, 1)) {
        static std::array<std::vector<std::unique_ptr<Fiber>>, kResidentBlocks> fibers;
        while (fibers[number].size() < shape.count()) {
            fibers[number].push_back(std::make_unique<Fiber>());
        }
        block.kernel = kernel;
        block.grid = grid;
        block.block = shape;
        const std::size_t unit = is_for_hopper ? kSharedAlignmentOfHopper : kSharedAlignment;
        block.shared = pages.end() - (shared_bytes + unit - 1) / unit * unit;
        block.shared_bytes = shared_bytes;
        block.body = &body;
        block.fibers = &fibers[number];
        block.n_threads = shape.count();
    }

    void begin(std::size_t n) {
        const Dim3 grid = block.grid;
        block.index = Dim3(static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                           static_cast<unsigned>(n / (std::size_t{grid.x} * grid.y)));
        // ones are a NaN in every floating type, which hides where a NaN is harmless: zeros then show it
        std::memset(pages.begin(), random_order() % 2 == 0 ? 0xff : 0, pages.size());
        begin_block(block);
    }
};

// Whether a thread of the block is ready or would be: behind a barrier, when something has happened, or as its
// condition holds.
bool can_go_on(const Resident& resident) {
    const Block& block = resident.block;
    return !block.ready.empty() || !block.events.empty() || block.waiting.empty() ||
           std::ranges::any_of(block.waiting, [&](std::size_t number) { return fiber_at(block, number).condition(); });
}

void check_launch(const std::string& name, Dim3 grid, Dim3 block, std::size_t shared_bytes, LaunchKind kind) {
    std::ostringstream problem;
    if (block.count() == 0 || block.count() > kMaxThreads || block.z > 64) {
        problem << "a block of " << block.x << " × " << block.y << " × " << block.z << " threads";
    } else if (grid.count() == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) {
        problem << "a grid of " << grid.x << " × " << grid.y << " × " << grid.z << " blocks";
    } else if (shared_bytes > (kind.is_for_hopper ? kMaxSharedBytesOfHopper : kMaxSharedBytes)) {
        problem << shared_bytes << " bytes of shared memory";
    } else if (kind.is_cooperative && grid.count() > kResidentBlocks) {
        problem << grid.count() << " blocks that wait for each other where " << kResidentBlocks << " run at once";
    } else {
        return;
    }
    throw ExecutionError(name + ": no device takes " + problem.str());
}

}  // namespace

namespace detail {

std::size_t draw(std::size_t n) {
    return random_order() % n;
}

Block& here() {
    if (running == nullptr || running->current == nullptr) {
        throw ExecutionError("a device function was called outside a kernel");
    }
    return *running;
}

void wait_in(State state) {
    Block& block = here();
    Fiber& fiber = *block.current;
    fiber.state = state;
    back_to_scheduler(block, fiber);
}

}  // namespace detail

void set_seed(std::uint64_t seed) {
    random_order.seed(seed);
}

void run_grid(const std::string& name, Dim3 grid, Dim3 block_shape, std::size_t shared_bytes,
              const std::function<void()>& body, LaunchKind kind) {
    if (running != nullptr) {
        throw ExecutionError(name + ": a kernel was launched from inside a kernel");
    }
    check_launch(name, grid, block_shape, shared_bytes, kind);
    std::vector<std::size_t> order(grid.count());
    for (std::size_t n = 0; n < order.size(); ++n) {
        order[n] = n;
    }
    std::shuffle(order.begin(), order.end(), random_order);

    std::vector<std::unique_ptr<Resident>> residents;
    for (std::size_t n = 0; n < std::min(kResidentBlocks, order.size()); ++n) {
        residents.push_back(
            std::make_unique<Resident>(n, name, grid, block_shape, shared_bytes, body, kind.is_for_hopper));
    }
    struct Finally {
        ~Finally() { running = nullptr; }
    } const finally;
    std::size_t n_begun = 0;
    for (const auto& resident : residents) {
        resident->begin(order[n_begun++]);
    }
    while (!residents.empty()) {
        const std::size_t place = random_order() % residents.size();
        // from one step to thousands: a block may be overtaken anywhere, and by far
        std::size_t n_steps = std::size_t{1} << random_order() % 13;
        Went went = Went::kOn;
        while (went == Went::kOn && n_steps-- > 0) {
            went = advance(residents[place]->block);
        }
        if (went == Went::kNowhere &&
            std::ranges::none_of(residents, [](const auto& own) { return can_go_on(*own); })) {
            throw ExecutionError(describe_waiting(residents[place]->block));
        }
        if (went == Went::kToTheEnd && n_begun < order.size()) {
            residents[place]->begin(order[n_begun++]);
        } else if (went == Went::kToTheEnd) {
            residents.erase(residents.begin() + static_cast<std::ptrdiff_t>(place));
        }
    }
}

}  // namespace cuda_on_cpu
