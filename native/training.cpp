/* Steps of optimizers, beside torch's own operations: what each does to an element is in kernels.cpp. */
#include <algorithm>
#include <atomic>
#include <cstring>

#include "internal.h"

using namespace lns;

namespace {

constexpr int64_t kPiece = 1 << 14; /* elements of a task */

void need(const void* pointer, const char* what) {
  if (!pointer) fail(LNS_BAD_VALUE, "%s is missing", what);
}

/* body(from, count) over pieces; the sum of what it returns */
template <class Body>
int64_t counted(int64_t count, int32_t threads, Body body) {
  std::atomic<int64_t> found{0};
  parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t i) {
    found += body(i * kPiece, std::min(count - i * kPiece, kPiece));
  });
  return found;
}

}  // namespace

int32_t lns_madam_octaves(int64_t count, const float* w, const float* g, const float* v, float least, float rate,
                          float bound, float* x, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (count <= 0) return;
    need(w, "w"), need(g, "g"), need(v, "v"), need(x, "x");
    const Isa& isa = current_isa();
    const MadamStep step{least, rate, bound, false, false};
    counted(count, threads, [&](int64_t i, int64_t n) {
      isa.octaves(step, n, w + i, g + i, v + i, x + i);
      return int64_t{0};
    });
  });
}

int32_t lns_madam_move(int64_t count, const float* w, const float* g, const float* x, const float* low,
                       const float* high, int64_t bounds, int32_t flip, int32_t ascend, float* y, int64_t* clipped,
                       int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    need(clipped, "clipped");
    *clipped = 0;
    if (count <= 0) return;
    need(w, "w"), need(g, "g"), need(x, "x"), need(low, "low"), need(high, "high"), need(y, "y");
    if (bounds != 1 && bounds != count) fail(LNS_BAD_VALUE, "there must be 1 or as many bounds as weights");
    const bool spread = bounds != 1;
    const Isa& isa = current_isa();
    const MadamStep step{0, 0, 0, flip != 0, ascend != 0};
    *clipped = counted(count, threads, [&](int64_t i, int64_t n) {
      const int64_t at = spread ? i : 0;
      return isa.move(step, n, w + i, g + i, x + i, low + at, high + at, spread, y + i);
    });
  });
}

int32_t lns_madam_codes(int64_t count, int16_t* codes, const float* g, const float* v, float least, float rate,
                        float bound, int32_t flip, int32_t ascend, const uint8_t* random, int32_t bits, int32_t drop,
                        const float* table, int64_t table_count, const int64_t* bases, int64_t bases_count, float* y,
                        int64_t* clipped, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    need(clipped, "clipped");
    *clipped = 0;
    if (count <= 0) return;
    need(codes, "codes"), need(g, "g"), need(v, "v"), need(table, "table"), need(bases, "bases"), need(y, "y");
    if (bits < 2 || bits > 16 || drop < 0 || drop > bits - 2) {
      fail(LNS_BAD_VALUE, "codes must have 2 to 16 bits, and 2 of them above those dropped");
    }
    const int32_t max_code = (1 << (bits - 1)) - 1, compute_max = (1 << (bits - drop - 1)) - 1;
    if (table_count < 1 || table_count > INT32_MAX) fail(LNS_BAD_VALUE, "the table must have 1 to 2^31 - 1 values");
    if (bases_count != 1 && bases_count != count) fail(LNS_BAD_VALUE, "there must be 1 or as many bases as codes");
    for (int64_t i = 0; i < bases_count; ++i) {
      if (bases[i] < -1 || bases[i] + max_code >= table_count) {
        fail(LNS_BAD_VALUE, "base %lld leads out of the table", static_cast<long long>(i));
      }
    }
    if (!(bound >= 0 && bound < 8388608.0f)) fail(LNS_BAD_VALUE, "steps must be less than 2^23, not %g", bound);
    const Isa& isa = current_isa();
    const bool spread = bases_count != 1;
    const CodeStep step{{least, rate, bound, flip != 0, ascend != 0}, max_code, drop, compute_max, table,
                        static_cast<int32_t>(table_count - 1)};
    *clipped = counted(count, threads, [&](int64_t i, int64_t n) {
      return isa.step_codes(step, n, codes + i, g + i, v + i, random ? random + i : nullptr, bases + (spread ? i : 0),
                            spread, y + i);
    });
  });
}

int32_t lns_random_bytes(uint64_t seed, uint64_t stream, uint64_t start, int64_t count, uint8_t* bytes,
                         int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (count <= 0) return;
    need(bytes, "bytes");
    constexpr int kLanes = 16;
    const uint64_t first = start / 16;
    const int64_t skipped = static_cast<int64_t>(start % 16), blocks = (skipped + count + 15) / 16;
    constexpr int64_t kBlocks = kPiece / 16;
    parallel((blocks + kBlocks - 1) / kBlocks, threads, [&](int64_t task) {
      for (int64_t b = task * kBlocks; b < std::min(blocks, (task + 1) * kBlocks); b += kLanes) {
        uint32_t c[4][kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const uint64_t block = first + static_cast<uint64_t>(b + i);
          c[0][i] = static_cast<uint32_t>(block), c[1][i] = static_cast<uint32_t>(block >> 32);
          c[2][i] = static_cast<uint32_t>(stream), c[3][i] = static_cast<uint32_t>(stream >> 32);
        }
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
          for (int i = 0; i < kLanes; ++i) {
            const uint64_t p = uint64_t{0xD2511F53} * c[0][i], q = uint64_t{0xCD9E8D57} * c[2][i];
            c[0][i] = static_cast<uint32_t>(q >> 32) ^ c[1][i] ^ k0, c[1][i] = static_cast<uint32_t>(q);
            c[2][i] = static_cast<uint32_t>(p >> 32) ^ c[3][i] ^ k1, c[3][i] = static_cast<uint32_t>(p);
          }
          k0 += 0x9E3779B9, k1 += 0xBB67AE85;
        }
        uint8_t made[kLanes * 16];
        for (int i = 0; i < kLanes; ++i) {
          for (int j = 0; j < 16; ++j) made[16 * i + j] = static_cast<uint8_t>(c[j / 4][i] >> (j % 4 * 8));
        }
        const int64_t at = 16 * b - skipped, from = std::max<int64_t>(at, 0);
        const int64_t end = std::min(count, at + 16 * kLanes);
        std::memcpy(bytes + from, made + (from - at), static_cast<size_t>(end - from));
      }
    });
  });
}
