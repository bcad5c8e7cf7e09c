#include "cpu/query_packings.h"

namespace rep_fast {

std::shared_ptr<const PackedQueries> QueryPackings::packed(ScanPass pass, int n_threads) {
    const std::lock_guard lock(mutex_);
    auto& kept = packed_[static_cast<std::size_t>(pass)];
    if (kept == nullptr) {
        kept = std::make_shared<const PackedQueries>(queries_, pass, n_threads);
    }
    return kept;
}

std::shared_ptr<const DitheredQueries> QueryPackings::dithered(const KeyMatrix& keys, const Int8Products& products,
                                                               const DitherOptions& options, int n_threads) {
    const std::lock_guard lock(mutex_);
    if (dithered_ == nullptr || drawn_with_ != options) {
        dithered_ = std::make_shared<const DitheredQueries>(queries_, products, column_scales(keys, queries_), options,
                                                            n_threads);
        drawn_with_ = options;
    }
    return dithered_;
}

}  // namespace rep_fast
