/* Fast dot products: a block of threads computes a tile of results from tiles of keys in shared memory, in the order of
 * k (spec 7.3), so it does what the datapath does at every step, whether or not that is associative.
 *
 * Compiled once for each choice of these macros:
 *   LNS_FAMILY  what a step is (below)
 *   LNS_MODE    linear: kWrap (fitted at the end; sums wrap in whatever integer), kSaturate (clamped at every step),
 *               kLanes (steps of LNS_LANES terms are fitted, then the sum)
 *   LNS_WIDE    linear: accumulators of 64 bits rather than 32
 *   LNS_COPIES  of the table in shared memory, a power of two up to 32, so that lanes of a warp do not meet in a bank;
 *               0: the table stays in global memory
 *   LNS_CLAMPS  log: the sum of kEntry (products may leave the accumulator's range), kHigh (sums may rise above it),
 *               kLow (sums may fall below code 1)
 *   LNS_DIRECT  log: the table has an entry for every difference of keys, rather than of codes
 *   LNS_TM, LNS_TN, LNS_TX, LNS_TY, LNS_BK: results of a thread, threads of a block, depth of a tile
 *   LNS_BLOCKS  blocks that a multiprocessor should hold
 *   LNS_DEPTH_FAST  neighbours in memory are along k (a matrix) rather than along m (an image)
 *
 * A key is what a word is looked up or added as; tables and number ranges are made and checked by
 * lnsdeploy/emulator/cuda.py, which chooses a kernel only where it gives the datapath's bits. */
#include "params.h"

#define LNS_TABLE 1    /* linear: a term by the sum of two keys (spec 4.1 to 4.3 are in the table) */
#define LNS_FLOAT 2    /* linear: a term is a float32 product, its significand rounded, its fraction dropped */
#define LNS_MITCHELL 3 /* linear: a term is the sum of two keys, read as a float32 (spec 4.1, t = 0) */
#define LNS_BINS 4     /* linear: as LNS_TABLE, into one of several accumulators (spec 4.2, "bin") */
#define LNS_PAIR 5     /* log: all sums of an accumulator's word and a product's, in a table (spec 5.1 to 5.3) */
#define LNS_LOG 6      /* log: keys hold code and sign; a difference of keys is looked up (spec 5.2) */

namespace lns {

constexpr int kWrap = 0, kSaturate = 1, kLanes = 2;
constexpr int kEntry = 1, kHigh = 2, kLow = 4;

constexpr bool kIsLog = LNS_FAMILY == LNS_PAIR || LNS_FAMILY == LNS_LOG;
constexpr int kThreads = LNS_TX * LNS_TY;
constexpr int kM = LNS_TM * LNS_TY, kN = LNS_TN * LNS_TX, kK = LNS_BK;
/* Rows of shared tiles begin at other banks, and at addresses that 16-byte loads can have. */
constexpr int kARow = kM + 4, kWRow = kN + 4;
constexpr int kALoads = kM * kK / kThreads, kWLoads = kN * kK / kThreads;
static_assert(kALoads * kThreads == kM * kK && kWLoads * kThreads == kN * kK, "a thread loads as many words as any other");
constexpr int kMVector = LNS_TM < 4 ? LNS_TM : 4, kNVector = LNS_TN < 4 ? LNS_TN : 4;

/* Far below every key: sums with a zero are recognised by their sign, or never win a comparison. */
constexpr i32 kZeroKey = -(1 << 28);

struct Tally {
  u32 saturated, flushed, saturated_negative;
};

__device__ __forceinline__ i32 least(i32 a, i32 b) { return a < b ? a : b; }
__device__ __forceinline__ i32 most(i32 a, i32 b) { return a > b ? a : b; }
__device__ __forceinline__ i64 least(i64 a, i64 b) { return a < b ? a : b; }
__device__ __forceinline__ i64 most(i64 a, i64 b) { return a > b ? a : b; }

/* Of integers of so many bits; those that saturate have fewer than T. */
template <class T>
__device__ __forceinline__ T largest(i32 bits) {
  return static_cast<T>((i64{1} << (bits - 1)) - 1);
}

/* One instruction from sm_90 on. */
__device__ __forceinline__ i32 add_least(i32 a, i32 b, i32 limit) { return __viaddmin_s32(a, b, limit); }
__device__ __forceinline__ i32 add_most(i32 a, i32 b, i32 limit) { return __viaddmax_s32(a, b, limit); }
__device__ __forceinline__ i64 add_least(i64 a, i64 b, i64 limit) { return least(a + b, limit); }

/* Bits of `a` where the mask has ones, else of `b`: one instruction, which the compiler does not find. */
__device__ __forceinline__ i32 pick(i32 a, i32 b, i32 mask) {
#if defined(__CUDA_ARCH__)
  i32 found;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(found) : "r"(a), "r"(b), "r"(mask));
  return found;
#else
  return (a & mask) | (b & ~mask);
#endif
}

struct Coding {
  u32 code;
  bool minus;
  __device__ __forceinline__ Coding(const Words& side, u32 word) {
    code = word & side.code;
    minus = (word & side.sign_bit) && code;
  }
};

/* Offsets within a group are 32 bits, which Python sees to. */
__device__ __forceinline__ u32 load_word(const Words& side, i32 i) {
  return side.bytes == 1 ? static_cast<const u8*>(side.data)[i] : static_cast<const u16*>(side.data)[i];
}
__device__ __forceinline__ Words from(Words side, i64 first) {
  side.data = static_cast<const char*>(side.data) + first * side.bytes;
  return side;
}

/* What of a row or column of a tile belongs to a thread: vectors of neighbours. */
template <int kVector, int kCount>
__device__ __forceinline__ int place(int thread, int threads, int i) {
  return i / kVector * (threads * kVector) + thread * kVector + i % kVector;
}

struct alignas(16) Four {
  i32 x[4];
};
struct alignas(8) Two {
  i32 x[2];
};
template <int kVector, int kCount>
__device__ __forceinline__ void load_keys(const i32* row, int thread, int threads, i32* keys) {
#pragma unroll
  for (int i = 0; i < kCount; i += kVector) {
    const i32* from = row + place<kVector, kCount>(thread, threads, i);
    if constexpr (kVector == 4) {
      const Four found = *reinterpret_cast<const Four*>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) keys[i + j] = found.x[j];
    } else if constexpr (kVector == 2) {
      const Two found = *reinterpret_cast<const Two*>(from);
      keys[i] = found.x[0], keys[i + 1] = found.x[1];
    } else {
      keys[i] = *from;
    }
  }
}

#if LNS_WIDE
using Acc = i64;
#else
using Acc = i32;
#endif

/* ---- families: what words become, and what a step does ------------------------------------------------------ */

/* A table whose entries are `Entry`, copied for the lanes of a warp. Places are in bytes from `base`; a lane's entries
 * begin at `lane`, so that no address needs an addition of its own. */
template <class Entry>
struct Lookup {
  static constexpr int kStride = (LNS_COPIES ? LNS_COPIES : 1) * static_cast<int>(sizeof(Entry));
  const char* base;
  i32 lane;
  __device__ __forceinline__ Lookup(const void* table, i64 entries, char* shared, i32 offset) {
#if LNS_COPIES
    base = shared;
    lane = offset + static_cast<i32>(threadIdx.x % LNS_COPIES) * static_cast<i32>(sizeof(Entry));
    Entry* copies = reinterpret_cast<Entry*>(shared + offset);
    for (i64 i = threadIdx.x; i < entries * LNS_COPIES; i += kThreads) {
      copies[i] = static_cast<const Entry*>(table)[i / LNS_COPIES];
    }
#else
    base = static_cast<const char*>(table);
    lane = 0;
    (void)entries, (void)shared, (void)offset;
#endif
  }
  static __device__ __forceinline__ i64 bytes(i64 entries) {
    return LNS_COPIES ? (entries * kStride + 15) / 16 * 16 : 0;
  }
  __device__ __forceinline__ Entry at(i32 place) const { return *reinterpret_cast<const Entry*>(base + place); }
};

/* Keys of LNS_TABLE, LNS_BINS and LNS_PAIR: a code, one block of the table further if negative, in bytes; a sum below 0
 * has a zero, and entry 0 is for those. numbers[0]: entries of a block. */
__device__ __forceinline__ i32 block_key(const Words& side, u32 word, i32 shift, i32 block, int stride) {
  const Coding c(side, word);
  if (c.code == 0) return kZeroKey;
  return (static_cast<i32>(c.code) * side.widen + shift + (c.minus ? block : 0)) * stride;
}

#if LNS_FAMILY == LNS_TABLE
struct Family {
  Lookup<Acc> table;
  Acc limit;
  static __device__ __forceinline__ i64 bytes(const Product& p) { return Lookup<Acc>::bytes(p.table_entries); }
  __device__ __forceinline__ Family(const Product& p, char* shared) : table(p.table, p.table_entries, shared, 0) {
    limit = largest<Acc>(p.acc_bits);
  }
  __device__ __forceinline__ i32 a_key(const Product& p, u32 word) const {
    return block_key(p.a, word, 0, p.numbers[0], Lookup<Acc>::kStride);
  }
  __device__ __forceinline__ i32 w_key(const Product& p, u32 word, i32) const {
    return block_key(p.w, word, 0, p.numbers[0], Lookup<Acc>::kStride);
  }
  __device__ __forceinline__ i32 a_ready(i32 key) const { return key + table.lane; }
  __device__ __forceinline__ Acc term(i32 a, i32 w) const { return table.at(add_most(a, w, table.lane)); }
};
#elif LNS_FAMILY == LNS_FLOAT || LNS_FAMILY == LNS_MITCHELL
/* a_values, w_values: keys by word. numbers[2], numbers[3]: what is added to a product's bits, and masks them. */
struct Family {
  Acc limit;
  i32 round_add, round_mask;
  static __device__ __forceinline__ i64 bytes(const Product&) { return 0; }
  __device__ __forceinline__ Family(const Product& p, char*) {
    limit = largest<i32>(p.acc_bits);
    round_add = p.numbers[2], round_mask = p.numbers[3];
  }
  __device__ __forceinline__ i32 a_key(const Product& p, u32 word) const {
    return static_cast<const i32*>(p.a_values)[word & (p.a.code | p.a.sign_bit)];
  }
  __device__ __forceinline__ i32 w_key(const Product& p, u32 word, i32) const {
    return static_cast<const i32*>(p.w_values)[word & (p.w.code | p.w.sign_bit)];
  }
  __device__ __forceinline__ i32 a_ready(i32 key) const { return key; }
  __device__ __forceinline__ Acc term(i32 a, i32 w) const {
#if LNS_FAMILY == LNS_FLOAT
    const float product = __fmul_rn(__int_as_float(a), __int_as_float(w));
    return __float2int_rz(__int_as_float((__float_as_int(product) + round_add) & round_mask));
#else
    /* signs are the top bits, and add up to their exclusive or */
    return __float2int_rz(__int_as_float(static_cast<i32>(static_cast<u32>(a) + static_cast<u32>(w))));
#endif
  }
};
#elif LNS_FAMILY == LNS_BINS
/* Entries hold 16 · term + bin. Accumulators are in shared memory, a thread's own: [bin][result][thread]. */
struct Family {
  static constexpr int kSlots = LNS_TM * LNS_TN;
  Lookup<i32> table;
  i32 limit;
  i32* acc;
  static __device__ __forceinline__ i64 bytes(const Product& p) {
    return Lookup<i32>::bytes(p.table_entries) + static_cast<i64>(p.bins) * kSlots * kThreads * 4;
  }
  __device__ __forceinline__ Family(const Product& p, char* shared) : table(p.table, p.table_entries, shared, 0) {
    limit = largest<i32>(p.acc_bits);
    acc = reinterpret_cast<i32*>(shared + Lookup<i32>::bytes(p.table_entries)) + threadIdx.x;
  }
  __device__ __forceinline__ i32 a_key(const Product& p, u32 word) const {
    return block_key(p.a, word, 0, p.numbers[0], Lookup<i32>::kStride);
  }
  __device__ __forceinline__ i32 w_key(const Product& p, u32 word, i32) const {
    return block_key(p.w, word, 0, p.numbers[0], Lookup<i32>::kStride);
  }
  __device__ __forceinline__ i32 a_ready(i32 key) const { return key + table.lane; }
  __device__ __forceinline__ i32 term(i32 a, i32 w) const { return table.at(add_most(a, w, table.lane)); }
  __device__ __forceinline__ i32* slot(i32 bin, int result) const { return acc + (bin * kSlots + result) * kThreads; }
};
#elif LNS_FAMILY == LNS_PAIR
/* table: the entered word of a product by sum of keys, sign · 128 + code; table2: bytes [accumulator, product]. */
struct Family {
  Lookup<i32> table;
  const u8* pairs;
  static __device__ __forceinline__ i64 bytes(const Product& p) { return Lookup<i32>::bytes(p.table_entries) + 65536; }
  __device__ __forceinline__ Family(const Product& p, char* shared) : table(p.table, p.table_entries, shared, 65536) {
    const Four* from = static_cast<const Four*>(p.table2);
    for (int i = threadIdx.x; i < 65536 / 16; i += kThreads) reinterpret_cast<Four*>(shared)[i] = from[i];
    pairs = reinterpret_cast<const u8*>(shared);
  }
  __device__ __forceinline__ i32 a_key(const Product& p, u32 word) const {
    return block_key(p.a, word, 0, p.numbers[0], Lookup<i32>::kStride);
  }
  __device__ __forceinline__ i32 w_key(const Product& p, u32 word, i32 shift) const {
    return block_key(p.w, word, shift, p.numbers[0], Lookup<i32>::kStride);
  }
  __device__ __forceinline__ i32 a_ready(i32 key) const { return key + table.lane; }
  __device__ __forceinline__ i32 start(i64 bias, const Product& p) const {
    const i32 code = static_cast<i32>(bias & p.adder.largest);
    return code | (code != 0 && (bias & ~p.adder.largest) != 0 ? 128 : 0);
  }
  __device__ __forceinline__ void step(i32& acc, i32 a, i32 w) const {
    acc = pairs[(static_cast<u32>(acc) << 8) + static_cast<u32>(table.at(add_most(a, w, table.lane)))];
  }
  __device__ __forceinline__ Coded result(i32 acc) const { return {acc & 127, acc > 128}; }
};
#elif LNS_FAMILY == LNS_LOG
/* A key is kUnit times a code, plus kSign if negative. Keys add: a product has 0, 1 or 2 times kSign, and its sign is
 * the lowest of these bits (a sum clamped to the largest code may have 3). So the difference of two keys is kUnit times
 * the difference of their codes, plus at most 3 · kSign either way, and whether signs differ is its lowest bit.
 *
 * table: what the larger key changes by, in keys. LNS_DIRECT: entry |difference| / kSign + 3; else entry
 * 2 · (difference of codes) + (signs are equal), a quarter of the size for two instructions more.
 * numbers[0]: the last place that is looked up, 3 · kSign included; numbers[1]: Λ. */
struct Family {
  static constexpr i32 kSign = 4 * (LNS_COPIES ? LNS_COPIES : 1), kUnit = 8 * kSign;
  Lookup<i32> table;
  i32 last, top;
  static __device__ __forceinline__ i64 bytes(const Product& p) { return Lookup<i32>::bytes(p.table_entries); }
  __device__ __forceinline__ Family(const Product& p, char* shared) : table(p.table, p.table_entries, shared, 0) {
    last = p.numbers[0] + table.lane;
    top = p.numbers[1] * kUnit + 2 * kSign;
  }
  static __device__ __forceinline__ i32 key(const Words& side, u32 word, i32 entry, i32 guard) {
    const Coding c(side, word);
    if (c.code == 0) return kZeroKey;
    return (static_cast<i32>(c.code) * side.widen + entry) * (1 << guard) * kUnit + (c.minus ? kSign : 0);
  }
  __device__ __forceinline__ i32 a_key(const Product& p, u32 word) const { return key(p.a, word, 0, p.adder.guard); }
  __device__ __forceinline__ i32 w_key(const Product& p, u32 word, i32 shift) const {
    return key(p.w, word, shift, p.adder.guard);
  }
  __device__ __forceinline__ i32 a_ready(i32 k) const { return k; }
  __device__ __forceinline__ i32 start(i64 bias, const Product& p) const {
    const i32 code = static_cast<i32>(bias & p.adder.largest);
    if (code == 0) return 2 * kZeroKey;
    return code * kUnit + ((bias & ~p.adder.largest) != 0 ? kSign : 0);
  }
  /* Not above Λ, the sign kept. */
  __device__ __forceinline__ i32 lowered(i32 k) const { return pick(k, least(k, top), kSign); }
  __device__ __forceinline__ void step(i32& acc, i32 a, i32 w) const {
#if LNS_CLAMPS & 1
    i32 product = lowered(a + w);
    product = product < kUnit ? 2 * kZeroKey : product;
    const i32 d = acc - product;
#else
    const i32 d = acc - a - w;
#endif
    i32 place = add_least(d < 0 ? -d : d, 3 * kSign + table.lane, last);
#if !LNS_DIRECT
    place = pick(place, place >> 2, 2 * kSign - 1);
#endif
    acc = acc - least(d, 0) + table.at(place);
#if LNS_CLAMPS & 2
    acc = lowered(acc);
#endif
#if LNS_CLAMPS & 4
    acc = acc < kUnit ? 2 * kZeroKey : acc;
#endif
  }
  __device__ __forceinline__ Coded result(i32 acc) const {
    if (acc < kUnit) return {0, false};
    return {acc / kUnit, (acc & kSign) != 0};
  }
};
#endif

/* ---- the product ----------------------------------------------------------------------------------------------- */

#define LNS_UNROLL _Pragma("unroll")
/* The block's shared memory, which tests' host build has elsewhere. */
#if !defined(LNS_SHARED)
#define LNS_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

extern "C" __global__ void __launch_bounds__(kThreads, LNS_BLOCKS) lns_product(const Product p) {
  LNS_SHARED(memory);
  const int thread = static_cast<int>(threadIdx.x), tx = thread % LNS_TX, ty = thread / LNS_TX;
  const Family family(p, memory);
  i32* rows = reinterpret_cast<i32*>(memory + Family::bytes(p));
  i32* shifts = rows + (kM + 3) / 4 * 4; /* spec 5.1, of the tile's channels */
  i32* a_tile = shifts + (kN + 3) / 4 * 4;
  i32* w_tile = a_tile + kK * kARow;
  u32* tallies = reinterpret_cast<u32*>(w_tile + kK * kWRow);

  const i64 first_m = static_cast<i64>(blockIdx.x) * kM, first_n = static_cast<i64>(blockIdx.y) * kN;
  const i64 group = blockIdx.z + p.first_group;
  for (int i = thread; i < kM; i += kThreads) {
    rows[i] = first_m + i < p.m ? p.rows[first_m + i] : -1;
  }
  if (kIsLog) {
    for (int i = thread; i < kN; i += kThreads) {
      shifts[i] = first_n + i < p.n ? static_cast<i32>(p.entry_shift[group * p.n + first_n + i]) : 0;
    }
  }
  if (thread < 3) tallies[thread] = 0;
  __syncthreads();

  /* words of the next tile, on their way while this one is computed */
  u32 a_next[kALoads], w_next[kWLoads];
  const auto a_place = [&](int i, int& m, int& k) {
    const int e = thread + i * kThreads;
#if LNS_DEPTH_FAST
    k = e % kK, m = e / kK;
#else
    m = e % kM, k = e / kM;
#endif
  };
  const i32 depth = static_cast<i32>(p.k), w_left = static_cast<i32>(p.n - first_n);
  const Words a_words = from(p.a, group * p.a_group), w_words = from(p.w, group * p.w_group + first_n * p.w_channel);
  const i32 w_channel = static_cast<i32>(p.w_channel), w_depth = static_cast<i32>(p.w_depth);
  const auto fetch = [&](i32 first) {
    LNS_UNROLL
    for (int i = 0; i < kALoads; ++i) {
      int m, k;
      a_place(i, m, k);
      const i32 row = rows[m];
      a_next[i] = row >= 0 && first + k < depth ? load_word(a_words, row + p.depths[first + k]) : 0;
    }
    LNS_UNROLL
    for (int i = 0; i < kWLoads; ++i) {
      const int e = thread + i * kThreads, n = e % kN, k = e / kN;
      w_next[i] = n < w_left && first + k < depth ? load_word(w_words, n * w_channel + (first + k) * w_depth) : 0;
    }
  };

#if LNS_FAMILY == LNS_BINS
  for (i32 bin = 0; bin < p.bins; ++bin) {
    for (int i = 0; i < LNS_TM * LNS_TN; ++i) *family.slot(bin, i) = 0;
  }
#else
  Acc acc[LNS_TM][LNS_TN];
#endif
  LNS_UNROLL
  for (int j = 0; j < LNS_TN; ++j) {
    const i64 n = first_n + place<kNVector, LNS_TN>(tx, LNS_TX, j);
    const i64 bias = n < p.n ? p.bias[group * p.n + n] : 0;
    LNS_UNROLL
    for (int i = 0; i < LNS_TM; ++i) {
#if LNS_FAMILY == LNS_BINS
      *family.slot(0, i * LNS_TN + j) = static_cast<i32>(bias);
#elif LNS_FAMILY == LNS_PAIR || LNS_FAMILY == LNS_LOG
      acc[i][j] = family.start(bias, p);
#else
      acc[i][j] = static_cast<Acc>(bias);
#endif
    }
  }

  fetch(0);
  for (i32 first = 0; first < depth; first += kK) {
    LNS_UNROLL
    for (int i = 0; i < kALoads; ++i) {
      int m, k;
      a_place(i, m, k);
      a_tile[k * kARow + m] = family.a_key(p, a_next[i]);
    }
    LNS_UNROLL
    for (int i = 0; i < kWLoads; ++i) {
      const int e = thread + i * kThreads, n = e % kN, k = e / kN;
      w_tile[k * kWRow + n] = family.w_key(p, w_next[i], kIsLog ? shifts[n] : 0);
    }
    __syncthreads();
    if (first + kK < depth) fetch(first + kK);
#if LNS_MODE == 2
    /* steps never cross tiles: LNS_BK is a multiple of LNS_LANES */
#pragma unroll 1
    for (int base = 0; base < kK; base += LNS_LANES) {
      Acc step[LNS_TM][LNS_TN];
      LNS_UNROLL
      for (int i = 0; i < LNS_TM; ++i) {
        LNS_UNROLL
        for (int j = 0; j < LNS_TN; ++j) step[i][j] = 0;
      }
      LNS_UNROLL
      for (int k = 0; k < LNS_LANES; ++k) {
        i32 a[LNS_TM], w[LNS_TN];
        load_keys<kMVector, LNS_TM>(a_tile + (base + k) * kARow, ty, LNS_TY, a);
        load_keys<kNVector, LNS_TN>(w_tile + (base + k) * kWRow, tx, LNS_TX, w);
        LNS_UNROLL
        for (int i = 0; i < LNS_TM; ++i) {
          const i32 ready = family.a_ready(a[i]);
          LNS_UNROLL
          for (int j = 0; j < LNS_TN; ++j) step[i][j] += family.term(ready, w[j]);
        }
      }
      LNS_UNROLL
      for (int i = 0; i < LNS_TM; ++i) {
        LNS_UNROLL
        for (int j = 0; j < LNS_TN; ++j) {
          acc[i][j] = fit(static_cast<Acc>(acc[i][j] + fit(step[i][j], p.psum_bits, p.saturate != 0)), p.acc_bits,
                          p.saturate != 0);
        }
      }
    }
#else
    LNS_UNROLL
    for (int k = 0; k < kK; ++k) {
      i32 a[LNS_TM], w[LNS_TN];
      load_keys<kMVector, LNS_TM>(a_tile + k * kARow, ty, LNS_TY, a);
      load_keys<kNVector, LNS_TN>(w_tile + k * kWRow, tx, LNS_TX, w);
#if LNS_FAMILY == LNS_BINS
      /* all reads, then all writes: results of a thread lie apart, which the compiler cannot know */
      i32 term[LNS_TM * LNS_TN], sum[LNS_TM * LNS_TN];
      i32* slot[LNS_TM * LNS_TN];
      LNS_UNROLL
      for (int i = 0; i < LNS_TM * LNS_TN; ++i) {
        const i32 entry = family.term(family.a_ready(a[i / LNS_TN]), w[i % LNS_TN]);
        slot[i] = family.slot(entry & 15, i);
        term[i] = entry >> 4;
      }
      LNS_UNROLL
      for (int i = 0; i < LNS_TM * LNS_TN; ++i) sum[i] = *slot[i];
      LNS_UNROLL
      for (int i = 0; i < LNS_TM * LNS_TN; ++i) {
#if LNS_MODE == 1
        sum[i] = most(add_least(sum[i], term[i], family.limit), -family.limit);
#else
        sum[i] = static_cast<i32>(static_cast<u32>(sum[i]) + static_cast<u32>(term[i]));
#endif
      }
      LNS_UNROLL
      for (int i = 0; i < LNS_TM * LNS_TN; ++i) *slot[i] = sum[i];
#else
      LNS_UNROLL
      for (int i = 0; i < LNS_TM; ++i) {
        const i32 ready = family.a_ready(a[i]);
        LNS_UNROLL
        for (int j = 0; j < LNS_TN; ++j) {
#if LNS_FAMILY == LNS_PAIR || LNS_FAMILY == LNS_LOG
          family.step(acc[i][j], ready, w[j]);
#elif LNS_MODE == 1
          acc[i][j] = most(add_least(acc[i][j], family.term(ready, w[j]), family.limit), -family.limit);
#elif LNS_WIDE
          acc[i][j] = static_cast<i64>(static_cast<u64>(acc[i][j]) + static_cast<u64>(family.term(ready, w[j])));
#else
          acc[i][j] = static_cast<i32>(static_cast<u32>(acc[i][j]) + static_cast<u32>(family.term(ready, w[j])));
#endif
        }
      }
#endif
    }
#endif
    __syncthreads();
  }

  Tally tally = {0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < LNS_TM; ++i) {
    const i64 m = first_m + place<kMVector, LNS_TM>(ty, LNS_TY, i);
    if (m >= p.m) continue;
    const i64 out_row = group * p.out_group + p.out_rows[m];
    LNS_UNROLL
    for (int j = 0; j < LNS_TN; ++j) {
      const i64 n = first_n + place<kNVector, LNS_TN>(tx, LNS_TX, j);
      if (n >= p.n) continue;
      const i64 shift = p.code_shift[group * p.n + n];
      u32 word;
#if LNS_FAMILY == LNS_PAIR || LNS_FAMILY == LNS_LOG
      i32 last = 0;
      LNS_UNROLL
      for (int r = 0; r < LNS_TM; ++r) last = r == i ? acc[r][j] : last;
      const Coded found = family.result(last);
      word = limited(leave(found.code, p.adder.guard) + shift, found.minus, found.code == 0, p.out.max_code,
                     p.out.least, p.out.sign_bit, tally);
#else
      i64 total = 0;
#if LNS_FAMILY == LNS_BINS
      for (i32 bin = 0; bin < p.bins; ++bin) {
        total += p.constants[bin] * fit(static_cast<i64>(*family.slot(bin, i * LNS_TN + j)), p.acc_bits, p.saturate != 0);
      }
#else
      LNS_UNROLL
      for (int r = 0; r < LNS_TM; ++r) total = r == i ? static_cast<i64>(acc[r][j]) : total;
      total = fit(total, p.acc_bits, p.saturate != 0);
      total *= p.constants[0];
#endif
      i64 code = 0;
      if (total != 0) {
        code = raw_code(static_cast<u64>(total < 0 ? -total : total), p.thresholds, p.starts, p.start_bits);
      }
      word = limited(code + shift, total < 0, total == 0, p.out.max_code, p.out.least, p.out.sign_bit, tally);
#endif
      const i64 at = out_row + n * p.out_channel;
      if (p.out.bytes == 1) {
        static_cast<u8*>(p.out.data)[at] = static_cast<u8>(word);
      } else {
        static_cast<u16*>(p.out.data)[at] = static_cast<u16>(word);
      }
    }
  }
  if (p.out.counts != nullptr) {
    if (tally.saturated) atomicAdd(tallies, tally.saturated);
    if (tally.flushed) atomicAdd(tallies + 1, tally.flushed);
    if (tally.saturated_negative) atomicAdd(tallies + 2, tally.saturated_negative);
    __syncthreads();
    if (thread < 3 && tallies[thread]) atomicAdd(p.out.counts + thread, static_cast<u64>(tallies[thread]));
  }
}

}  // namespace lns
