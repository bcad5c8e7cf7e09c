// What a running thread may ask of the executor.
#include <cstring>
#include <sstream>
#include <utility>

#include "fibers.h"

namespace cuda_on_cpu {

using namespace detail;

namespace {

void land(const std::vector<PendingCopy>& copies) {
    for (const PendingCopy& copy : copies) {
        std::memcpy(copy.destination, copy.source, copy.bytes);
    }
}

}  // namespace

const Dim3& grid_size() {
    return here().grid;
}
const Dim3& block_size() {
    return here().block;
}
const Dim3& block_index() {
    return here().index;
}
const Dim3& thread_index() {
    return here().current->index;
}
unsigned lane() {
    return here().current->lane();
}
void* shared_memory() {
    return here().shared;
}

void block_barrier() {
    wait_in(State::kAtBlockBarrier);
}

bool block_any(bool predicate) {
    Block& block = here();
    const std::size_t vote = block.open_vote;
    block.votes[vote] |= predicate;
    block_barrier();
    return block.votes[vote];
}

void warp_barrier(unsigned mask) {
    Fiber& fiber = *here().current;
    if ((mask >> fiber.lane() & 1u) == 0) {
        std::ostringstream text;
        text << here().kernel << ": lane " << fiber.lane() << " calls a warp operation whose mask 0x" << std::hex
             << mask << " does not name it";
        throw ExecutionError(text.str());
    }
    fiber.mask = mask;
    wait_in(State::kAtWarpBarrier);
}

void exchange_bytes(unsigned mask, const void* mine, void* all, std::size_t bytes) {
    Block& block = here();
    const Fiber& fiber = *block.current;
    auto& slots = block.warp_slots[fiber.warp()];
    if (slots.size() < kWarpSize * bytes) {
        slots.resize(kWarpSize * bytes);
    }
    warp_barrier(mask);  // nobody writes while a slower lane still reads the last exchange
    std::memcpy(slots.data() + fiber.lane() * bytes, mine, bytes);
    warp_barrier(mask);
    for (unsigned other = 0; other < kWarpSize; ++other) {
        unsigned char* place = static_cast<unsigned char*>(all) + other * bytes;
        if (mask >> other & 1u) {
            std::memcpy(place, slots.data() + other * bytes, bytes);
        } else {
            std::memset(place, 0, bytes);
        }
    }
}

WarpWords exchange(unsigned mask, std::uint64_t mine) {
    WarpWords words{};
    exchange_bytes(mask, &mine, words.data(), sizeof(mine));
    return words;
}

void copy_later(void* destination, const void* source, std::size_t bytes) {
    here().current->open_copies.push_back({destination, source, bytes});
}

void commit_copies() {
    Fiber& fiber = *here().current;
    fiber.committed_copies.push_back(std::exchange(fiber.open_copies, {}));
}

void wait_for_copies(unsigned pending) {
    Fiber& fiber = *here().current;
    while (fiber.committed_copies.size() > pending) {
        land(fiber.committed_copies.front());
        fiber.committed_copies.pop_front();
    }
}

void wait_until(std::function<bool()> holds) {
    if (!holds()) {
        here().current->condition = std::move(holds);
        wait_in(State::kAtCondition);
    }
}

void happen_later(std::function<void()> event) {
    here().events.push_back({std::move(event), draw(2) == 0});
}

void work_later(std::function<void()> work) {
    here().current->open_work.push_back(std::move(work));
}

void commit_work() {
    Fiber& fiber = *here().current;
    fiber.committed_work.push_back(std::exchange(fiber.open_work, {}));
}

void wait_for_work(unsigned pending) {
    Fiber& fiber = *here().current;
    while (fiber.committed_work.size() > pending) {
        for (const auto& work : fiber.committed_work.front()) {
            work();
        }
        fiber.committed_work.pop_front();
    }
}

std::uint32_t shared_offset(const void* address) {
    const Block& block = here();
    const std::ptrdiff_t offset = static_cast<const unsigned char*>(address) - block.shared;
    if (offset < 0 || static_cast<std::size_t>(offset) >= block.shared_bytes) {
        throw ExecutionError(block.kernel + ": an address is not in shared memory");
    }
    return static_cast<std::uint32_t>(offset);
}

unsigned char* shared_at(std::uint32_t offset) {
    const Block& block = here();
    if (offset >= block.shared_bytes) {
        throw ExecutionError(block.kernel + ": an offset is not in shared memory");
    }
    return block.shared + offset;
}

std::any& notes() {
    return here().current->notes;
}

namespace detail {

void fail_shuffle(unsigned mask, unsigned source) {
    std::ostringstream text;
    text << here().kernel << ": a shuffle reads lane " << source << ", which mask 0x" << std::hex << mask
         << " does not name";
    throw ExecutionError(text.str());
}

}  // namespace detail
}  // namespace cuda_on_cpu
