// Blocks of work taken by threads as they become free.
#pragma once

#include <cstdint>
#include <functional>

namespace rep_fast {

// Calls work(block, worker) once for every block in [0, n_blocks), from at most n_threads threads (the caller's is one
// of them); worker < n_threads numbers the thread, so that scratch can be kept per worker. A static split would lose
// half its speed as soon as one core is busy. The first exception stops the queue and is thrown here.
//
// Inside, subnormal numbers are kept (torch.set_flush_denormal would change scores and void the error bounds); the
// caller's setting is restored.
void run_blocks(std::int64_t n_blocks, int n_threads, const std::function<void(std::int64_t block, int worker)>& work);

}  // namespace rep_fast
