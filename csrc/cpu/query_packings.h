// The packings of one matrix of queries, each made when a pass first asks for it: kept by the caller, they serve every
// block of a stream.
#pragma once

#include <array>
#include <memory>
#include <mutex>

#include "cpu/dithered_queries.h"
#include "cpu/packed_queries.h"

namespace rep_fast {

class QueryPackings {
  public:
    // The queries are read whenever a packing is made and whenever a pair is scored: they must stay as they are.
    explicit QueryPackings(MatrixView<const float> queries) : queries_(queries) {}

    MatrixView<const float> queries() const { return queries_; }
    // For every pass but the int8 one; from any thread.
    std::shared_ptr<const PackedQueries> packed(ScanPass pass, int n_threads);
    // Made anew for other options; the columns are balanced by the keys of the first call.
    std::shared_ptr<const DitheredQueries> dithered(const KeyMatrix& keys, const Int8Products& products,
                                                    const DitherOptions& options, int n_threads);

  private:
    MatrixView<const float> queries_;
    std::mutex mutex_;
    std::array<std::shared_ptr<const PackedQueries>, kScanPassNames.size()> packed_;
    std::shared_ptr<const DitheredQueries> dithered_;
    DitherOptions drawn_with_;
};

}  // namespace rep_fast
