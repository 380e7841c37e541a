/* The scalar stages of the arithmetic, one text for every compiler: the native library (native/), the GPU kernels that
 * NVRTC compiles when they are first needed, and the host build of those kernels that tests run. Paragraphs cited as
 * "spec N.N" are those of docs/datapath.md.
 *
 * It includes nothing: NVRTC has no standard library. */
#ifndef LNS_STAGES_H
#define LNS_STAGES_H

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#define LNS_STAGE __device__ __forceinline__
#else
#define LNS_STAGE inline
#endif

namespace lns {
namespace stages {

using u8 = unsigned char;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

/* The position of a positive integer's leading one. */
LNS_STAGE int leading_one(u64 x) {
#if defined(__CUDA_ARCH__)
  return 63 - __clzll(static_cast<i64>(x));
#else
  return 63 - __builtin_clzll(x);
#endif
}

/* Integers fitted to a width (spec 4.4). */
template <class T>
LNS_STAGE T fit(T value, int bits, bool saturate) {
  if (saturate) {
    const T limit = (T{1} << (bits - 1)) - 1;
    return value > limit ? limit : value < -limit ? -limit : value;
  }
  const T half = T{1} << (bits - 1);
  return ((value + half) & (2 * half - 1)) - half;
}

/* The raw code of a magnitude (spec 4.6): how many of the sorted thresholds it reaches, where the last threshold is one
 * that nothing reaches. `start`, indexed by the leading one and the `bits` bits after it, says how many are certain. */
template <class Threshold, class Start>
LNS_STAGE i64 raw_code(u64 magnitude, const Threshold* thresholds, const Start* start, int bits) {
  const int p = leading_one(magnitude);
  const u64 top = p >= bits ? magnitude >> (p - bits) : magnitude << (bits - p);
  i64 k = start[(static_cast<i64>(p) << bits) + static_cast<i64>(top) - (i64{1} << bits)];
  while (thresholds[k] <= magnitude) ++k;
  return k;
}

/* A code as a word of a format (spec 2.4). Counts has saturated, flushed and saturated_negative. */
template <class Counts>
LNS_STAGE u32 limited(i64 code, bool minus, bool zero, i64 max_code, u32 least, u32 sign_bit, Counts& counts) {
  if (sign_bit == 0 && minus) zero = true;
  if (zero) return least;
  u32 result;
  if (code > max_code) {
    ++counts.saturated;
    counts.saturated_negative += minus;
    result = static_cast<u32>(max_code);
  } else if (code < 1) {
    ++counts.flushed;
    result = least;
  } else {
    result = static_cast<u32>(code);
  }
  return minus && result != 0 ? result | sign_bit : result;
}

/* A code of a log accumulator with its sign; 0 is zero. */
struct Coded {
  i64 code;
  bool minus;
};

/* A code at the accumulator's scale, limited to its range (spec 5.1); `code` 0 is zero. */
LNS_STAGE Coded enter(i64 code, bool minus, i64 shift, i64 largest, int guard) {
  const i64 shifted = code + shift;
  if (code == 0 || shifted < 1) return {0, false};
  return {shifted > largest >> guard ? largest : shifted << guard, minus};
}

/* One addition (spec 5.2, 5.3); Δ is 0 past the end of its table. */
LNS_STAGE Coded add(Coded x, Coded y, const i32* plus, i64 plus_count, const i32* minus, i64 minus_count, i64 largest) {
  const Coded large = x.code < y.code ? y : x, small = x.code < y.code ? x : y;
  if (small.code == 0) return large;
  const i64 d = large.code - small.code;
  i64 total = large.code;
  if (large.minus == small.minus) {
    total += d < plus_count ? plus[d] : 0;
  } else {
    if (d == 0) return {0, false};
    total -= d < minus_count ? minus[d] : 0;
  }
  if (total < 1) return {0, false};
  return {total < largest ? total : largest, large.minus};
}

/* A code without its guard bits, rounded (spec 5.6). */
LNS_STAGE i64 leave(i64 code, int guard) { return (code + ((i64{1} << guard) >> 1)) >> guard; }

}  // namespace stages
}  // namespace lns

#undef LNS_STAGE
#endif
