// The checksum of kernels/checksum.py. It is a sum, so parts of the bytes may be added in any order.
#pragma once

#include <cstdint>

namespace checksum {

// What the number of bytes adds.
uint64_t of_size(int64_t num_bytes);

// What bytes [offset, offset + num_bytes) add, which stand at `data`; `offset` is a multiple of 4.
uint64_t of_part(const char* data, int64_t offset, int64_t num_bytes);

// The same, of bytes that are copied on the way: past the caches where they are too many to stay there.
uint64_t copy_part(const char* from, char* to, int64_t offset, int64_t num_bytes, bool past_caches);

}  // namespace checksum
