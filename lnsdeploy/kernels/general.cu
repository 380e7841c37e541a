/* Kernels for every datapath and operation, one thread an element, in 64 bits: the dot products that have no kernel of
 * their own in products.cu, and everything that is no dot product. No thread waits for another here. */
#include "params.h"

namespace lns {

struct Tally {
  u32 saturated, flushed, saturated_negative;
};

__device__ __forceinline__ void count(const Result& out, const Tally& t) {
  if (out.counts == nullptr) return;
  if (t.saturated) atomicAdd(out.counts, static_cast<u64>(t.saturated));
  if (t.flushed) atomicAdd(out.counts + 1, static_cast<u64>(t.flushed));
  if (t.saturated_negative) atomicAdd(out.counts + 2, static_cast<u64>(t.saturated_negative));
}

__device__ __forceinline__ u32 load_word(const Words& x, i64 i) {
  return x.bytes == 1 ? static_cast<const u8*>(x.data)[i] : static_cast<const u16*>(x.data)[i];
}

__device__ __forceinline__ bool negative(const Words& x, u32 word) { return (word & x.sign_bit) && (word & x.code); }

__device__ __forceinline__ void store_word(const Result& out, i64 i, u32 word) {
  if (out.bytes == 1) {
    static_cast<u8*>(out.data)[i] = static_cast<u8>(word);
  } else {
    static_cast<u16*>(out.data)[i] = static_cast<u16>(word);
  }
}

__device__ __forceinline__ void store(const Result& out, i64 i, i64 code, bool minus, bool zero, Tally& t) {
  store_word(out, i, limited(code, minus, zero, out.max_code, out.least, out.sign_bit, t));
}

__device__ __forceinline__ Coded sum(const Adder& a, Coded x, Coded y) {
  return add(x, y, a.plus, a.plus_count, a.minus, a.minus_count, a.largest);
}

__device__ __forceinline__ i64 first_element() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 next_element() { return static_cast<i64>(gridDim.x) * blockDim.x; }

/* Adds what it is given as a balanced tree over `lanes` and each group to a sum (spec 5.4). A level holds the sum of
 * 2^level neighbours, or nothing: like the digits of the number of leaves. */
struct Tree {
  Coded level[11];
  i32 leaves = 0;

  __device__ __forceinline__ void leaf(const Adder& a, Coded x) {
    i32 at = 0;
    for (i32 bit = leaves; bit & 1; bit >>= 1) x = sum(a, level[at++], x);
    level[at] = x;
    ++leaves;
  }
  /* an odd one passes up until it finds a partner on its left */
  __device__ __forceinline__ Coded close(const Adder& a) {
    Coded all = {0, false};
    for (i32 at = 0; leaves >> at; ++at) {
      if (leaves >> at & 1) all = sum(a, level[at], all);
    }
    leaves = 0;
    return all;
  }
};

/* ---- dot products ------------------------------------------------------------------------------------------ */

struct Place {
  i64 z, m, n;
  __device__ __forceinline__ Place(const Product& p, i64 i) {
    n = i % p.n;
    m = i / p.n % p.m;
    z = i / p.n / p.m + p.first_group;
  }
};

/* numbers[0]: groups of this launch. table: terms int64 [bins, columns]. Bins are taken a few at a time: none of them
 * knows of another (spec 4.4). */
extern "C" __global__ void lns_general_linear(const Product p) {
  constexpr int kBins = 16;
  const i64* terms = static_cast<const i64*>(p.table);
  const i64 count_all = p.m * p.n * p.numbers[0];
  Tally tally = {0, 0, 0};
  for (i64 i = first_element(); i < count_all; i += next_element()) {
    const Place at(p, i);
    const i64 channel = at.z * p.n + at.n;
    const i64 row = at.z * p.a_group + p.rows[at.m], column = at.z * p.w_group + at.n * p.w_channel;
    i64 total = 0;
    for (i32 first = 0; first < p.bins; first += kBins) {
      const int bins = p.bins - first < kBins ? p.bins - first : kBins;
      i64 acc[kBins], step[kBins];
      for (int b = 0; b < bins; ++b) acc[b] = first + b == 0 ? p.bias[channel] : 0;
      for (i64 k = 0; k < p.k;) {
        for (int b = 0; b < bins; ++b) step[b] = 0;
        for (i32 lane = 0; lane < p.lanes && k < p.k; ++lane, ++k) {
          const u32 x = load_word(p.a, row + p.depths[k]), y = load_word(p.w, column + k * p.w_depth);
          const i64 cx = x & p.a.code, cy = y & p.w.code;
          if (cx == 0 || cy == 0) continue;
          const i64 code = cx * p.a.widen + cy * p.w.widen;
          const bool minus = negative(p.a, x) != negative(p.w, y);
          for (int b = 0; b < bins; ++b) {
            const i64 term = terms[(first + b) * p.term_columns + code];
            step[b] += minus ? -term : term;
          }
        }
        for (int b = 0; b < bins; ++b) {
          acc[b] = fit(acc[b] + fit(step[b], p.psum_bits, p.saturate != 0), p.acc_bits, p.saturate != 0);
        }
      }
      for (int b = 0; b < bins; ++b) total += p.constants[first + b] * acc[b];
    }
    i64 code = 0;
    if (total != 0) code = raw_code(static_cast<u64>(total < 0 ? -total : total), p.thresholds, p.starts, p.start_bits);
    store(p.out, at.z * p.out_group + p.out_rows[at.m] + at.n * p.out_channel, code + p.code_shift[channel], total < 0,
          total == 0, tally);
  }
  count(p.out, tally);
}

/* numbers[0]: groups of this launch (spec 5). */
extern "C" __global__ void lns_general_log(const Product p) {
  const i64 count_all = p.m * p.n * p.numbers[0];
  Tally tally = {0, 0, 0};
  for (i64 i = first_element(); i < count_all; i += next_element()) {
    const Place at(p, i);
    const i64 channel = at.z * p.n + at.n, shift = p.entry_shift[channel];
    const i64 row = at.z * p.a_group + p.rows[at.m], column = at.z * p.w_group + at.n * p.w_channel;
    const i64 bias = p.bias[channel];
    Coded acc = {bias & p.adder.largest, false};
    acc.minus = acc.code != 0 && (bias & ~p.adder.largest) != 0;
    Tree tree;
    for (i64 k = 0; k < p.k; ++k) {
      const u32 x = load_word(p.a, row + p.depths[k]), y = load_word(p.w, column + k * p.w_depth);
      const i64 cx = x & p.a.code, cy = y & p.w.code;
      const i64 code = cx == 0 || cy == 0 ? 0 : cx * p.a.widen + cy * p.w.widen;
      tree.leaf(p.adder, enter(code, negative(p.a, x) != negative(p.w, y), shift, p.adder.largest, p.adder.guard));
      if (tree.leaves == p.adder.lanes || k + 1 == p.k) acc = sum(p.adder, acc, tree.close(p.adder));
    }
    const bool zero = acc.code == 0;
    store(p.out, at.z * p.out_group + p.out_rows[at.m] + at.n * p.out_channel,
          leave(acc.code, p.adder.guard) + p.code_shift[channel], acc.minus, zero, tally);
  }
  count(p.out, tally);
}

/* ---- element by element ------------------------------------------------------------------------------------ */

/* table: u32 by word: the result's word, and from bit 16 whether it saturated, was flushed, saturated with a minus
 * (spec 6.1 to 6.3). */
extern "C" __global__ void lns_map(const Map p) {
  const u32* table = static_cast<const u32*>(p.table);
  Tally tally = {0, 0, 0};
  for (i64 i = first_element(); i < p.count; i += next_element()) {
    const u32 entry = table[load_word(p.x, i) & (p.x.code | p.x.sign_bit)];
    tally.saturated += entry >> 16 & 1;
    tally.flushed += entry >> 17 & 1;
    tally.saturated_negative += entry >> 18 & 1;
    store_word(p.out, i, entry & 0xffff);
  }
  count(p.out, tally);
}

/* spec 2.1, 2.4. x: float32. table: u32 bounds, the bits of the smallest float of each code, and one that nothing
 * reaches; table2: i32 by the bits above numbers[0] of a float: how many bounds are certain. NaN becomes zero. */
extern "C" __global__ void lns_encode(const Map p) {
  const u32* bounds = static_cast<const u32*>(p.table);
  const i32* start = static_cast<const i32*>(p.table2);
  const u32* x = static_cast<const u32*>(p.x.data);
  for (i64 i = first_element(); i < p.count; i += next_element()) {
    u32 bits = x[i];
    const bool minus = bits >> 31;
    bits &= 0x7fffffffu;
    u32 word = 0;
    if (bits <= 0x7f800000u) {
      if (minus && p.out.sign_bit == 0) bits = 0;
      i32 code = start[bits >> p.numbers[0]];
      while (bounds[code] <= bits) ++code;
      word = static_cast<u32>(code);
      if (minus && code != 0 && bits != 0) word |= p.out.sign_bit;
    }
    store_word(p.out, i, word);
  }
}

/* spec 2.5. table: float32 by word. */
extern "C" __global__ void lns_decode(const Map p) {
  const float* table = static_cast<const float*>(p.table);
  float* y = static_cast<float*>(p.out.data);
  for (i64 i = first_element(); i < p.count; i += next_element()) {
    y[i] = table[load_word(p.x, i) & (p.x.code | p.x.sign_bit)];
  }
}

__device__ __forceinline__ Coded entered(const Words& x, u32 word, i64 shift, const Adder& a) {
  return enter(word & x.code, negative(x, word), shift, a.largest, a.guard);
}

/* spec 6.4 */
extern "C" __global__ void lns_add(const Sum p) {
  Tally tally = {0, 0, 0};
  for (i64 i = first_element(); i < p.count; i += next_element()) {
    i64 rest = i, at_a = 0, at_b = 0;
    for (i32 axis = p.rank - 1; axis >= 0; --axis) {
      const i64 index = rest % p.shape[axis];
      rest /= p.shape[axis];
      at_a += index * p.a_strides[axis];
      at_b += index * p.b_strides[axis];
    }
    const Coded total = sum(p.adder, entered(p.a, load_word(p.a, at_a), p.a_shift, p.adder),
                            entered(p.b, load_word(p.b, at_b), p.b_shift, p.adder));
    store(p.out, i, leave(total.code, p.adder.guard) + p.code_shift, total.minus, total.code == 0, tally);
  }
  count(p.out, tally);
}

/* ---- windows ------------------------------------------------------------------------------------------------- */

struct Position {
  i64 outer, at[3];
  __device__ __forceinline__ Position(const Window& w, i64 i) {
    for (int axis = 2; axis >= 0; --axis) {
      at[axis] = i % w.out[axis];
      i /= w.out[axis];
    }
    outer = i;
  }
  /* The element under tap number t of the window, or −1 for padding. */
  __device__ __forceinline__ i64 element(const Window& w, i64 t) const {
    i64 index = 0, where[3];
    for (int axis = 2; axis >= 0; --axis) {
      where[axis] = at[axis] * w.strides[axis] - w.begins[axis] + t % w.kernel[axis] * w.dilations[axis];
      t /= w.kernel[axis];
      if (where[axis] < 0 || where[axis] >= w.size[axis]) return -1;
    }
    for (int axis = 0; axis < 3; ++axis) index = index * w.size[axis] + where[axis];
    return outer * w.size[0] * w.size[1] * w.size[2] + index;
  }
};

__device__ __forceinline__ i64 taps_of(const Window& w) { return w.kernel[0] * w.kernel[1] * w.kernel[2]; }
__device__ __forceinline__ i64 results_of(const Pool& p) {
  return p.outer * p.window.out[0] * p.window.out[1] * p.window.out[2];
}

/* spec 6.1: every window holds an element. */
extern "C" __global__ void lns_max_pool(const Pool p) {
  const i64 taps = taps_of(p.window), results = results_of(p);
  for (i64 i = first_element(); i < results; i += next_element()) {
    const Position position(p.window, i);
    i32 best = -(1 << 30);
    for (i64 t = 0; t < taps; ++t) {
      const i64 at = position.element(p.window, t);
      if (at < 0) continue;
      const u32 word = load_word(p.x, at);
      const i32 code = static_cast<i32>(word & p.x.code), key = negative(p.x, word) ? -code : code;
      best = key > best ? key : best;
    }
    store_word(p.out, i, best < 0 ? static_cast<u32>(-best) | p.x.sign_bit : static_cast<u32>(best));
  }
}

/* spec 6.5; log_counts of 0 make a sum. */
extern "C" __global__ void lns_average_pool(const Pool p) {
  const i64 taps = taps_of(p.window), results = results_of(p);
  Tally tally = {0, 0, 0};
  for (i64 i = first_element(); i < results; i += next_element()) {
    const Position position(p.window, i);
    Coded acc = {0, false};
    Tree tree;
    for (i64 t = 0; t < taps; ++t) {
      const i64 at = position.element(p.window, t);
      tree.leaf(p.adder, at < 0 ? Coded{0, false} : entered(p.x, load_word(p.x, at), p.input_shift, p.adder));
      if (tree.leaves == p.adder.lanes || t + 1 == taps) acc = sum(p.adder, acc, tree.close(p.adder));
    }
    i64 which = 0;
    for (int axis = 0; axis < 3; ++axis) {
      which = which * p.log_shape[axis] + (p.log_shape[axis] == 1 ? 0 : position.at[axis]);
    }
    const i64 code = acc.code - p.log_counts[which];
    const bool zero = acc.code == 0 || code < 1;
    store(p.out, i, leave(code, p.adder.guard) + p.code_shift, acc.minus, zero, tally);
  }
  count(p.out, tally);
}

extern "C" __global__ void lns_pad(const Pad p) {
  const i64 count_all = p.outer * p.padded[0] * p.padded[1] * p.padded[2];
  for (i64 i = first_element(); i < count_all; i += next_element()) {
    i64 rest = i, at[3];
    bool inside = true;
    for (int axis = 2; axis >= 0; --axis) {
      at[axis] = rest % p.padded[axis] - p.begins[axis];
      rest /= p.padded[axis];
      inside = inside && at[axis] >= 0 && at[axis] < p.size[axis];
    }
    const i64 from = ((rest * p.size[0] + at[0]) * p.size[1] + at[1]) * p.size[2] + at[2];
    if (p.bytes == 1) {
      static_cast<u8*>(p.out)[i] = inside ? static_cast<const u8*>(p.x)[from] : u8{0};
    } else {
      static_cast<u16*>(p.out)[i] = inside ? static_cast<const u16*>(p.x)[from] : u16{0};
    }
  }
}

}  // namespace lns
