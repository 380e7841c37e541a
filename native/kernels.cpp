/* The inner loops, compiled once for each instruction set. Vectors are the compiler's own (vector_size), so that one
 * text serves all; intrinsics appear where a table is looked up. Nothing here depends on the order of threads, and
 * every kernel gives the bits of the general one. */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "internal.h"

#if defined(LNS_EMULATE_AVX512)
#include "avx512_emulated.h"
#define LNS_AVX512
#elif defined(__x86_64__)
#include <immintrin.h>
#if defined(__AVX512VBMI__)
#define LNS_AVX512
#elif defined(__AVX2__)
#define LNS_AVX2
#endif
#endif

/* Vectors of other sizes than the machine's are passed to functions that are always inlined only. */
#pragma GCC diagnostic ignored "-Wpsabi"

#ifndef LNS_ISA_NAME
#define LNS_ISA_NAME portable
#define LNS_ISA_ID 0
#endif
#define LNS_JOIN2(a, b) a##b
#define LNS_JOIN(a, b) LNS_JOIN2(a, b)
#define LNS_STRING2(a) #a
#define LNS_STRING(a) LNS_STRING2(a)

namespace lns {
namespace {

#if defined(LNS_AVX512)
constexpr int kBytes = 64;
#elif defined(LNS_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int V = kBytes / 4;

typedef int32_t vi __attribute__((vector_size(kBytes), may_alias));
typedef uint32_t vu __attribute__((vector_size(kBytes), may_alias));
typedef float vf __attribute__((vector_size(kBytes), may_alias));
typedef double vd __attribute__((vector_size(kBytes), may_alias));
typedef int64_t vl __attribute__((vector_size(kBytes), may_alias));

/* the same anywhere in memory */
typedef int32_t vi_anywhere __attribute__((vector_size(kBytes), may_alias, aligned(4)));

#define LNS_INLINE inline __attribute__((always_inline))

LNS_INLINE vi all(int32_t x) { return x - vi{}; }
LNS_INLINE vl all(int64_t x) { return x - vl{}; }
LNS_INLINE vd all(double x) { return x - vd{}; }
LNS_INLINE vi add(vi a, vi b) { return (vi)((vu)a + (vu)b); }
LNS_INLINE vd add(vd a, vd b) { return a + b; }
LNS_INLINE vi least(vi a, vi b) { return a < b ? a : b; }
LNS_INLINE vi most(vi a, vi b) { return a > b ? a : b; }
LNS_INLINE vi clamp(vi x, vi limit) { return most(least(x, limit), -limit); }
LNS_INLINE vd clamp(vd x, vd limit) {
  x = x < limit ? x : limit;
  return x > -limit ? x : -limit;
}

LNS_INLINE vi gather(const int32_t* table, vi index) {
#if defined(LNS_AVX512)
  return (vi)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(LNS_AVX2)
  return (vi)_mm256_i32gather_epi32(table, (__m256i)index, 4);
#else
  vi found;
  for (int i = 0; i < V; ++i) found[i] = table[index[i]];
  return found;
#endif
}

/* Whether any lane is not zero. */
LNS_INLINE bool any(vi x) {
#if defined(LNS_AVX512)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(LNS_AVX2)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  int32_t found = 0;
  for (int i = 0; i < V; ++i) found |= x[i];
  return found != 0;
#endif
}

/* Vectors of sums of a type, anywhere that a kernel keeps them, and what they are clamped to. */
template <class T>
struct Limits;
template <>
struct Limits<int32_t> {
  typedef vi_anywhere Vector;
  static int32_t sum(const Layer& l) { return l.limit; }
  static int32_t step(const Layer& l) { return l.step_limit; }
};
template <>
struct Limits<double> {
  typedef vd Vector;
  static double sum(const Layer& l) { return l.wide_limit; }
  static double step(const Layer& l) { return l.wide_step_limit; }
};

/* How far from zero the sums of a row may be for nothing to be clamped in a block of depth; negative if anything
 * might be. */
template <class T>
LNS_INLINE T room(const Tile& t, int64_t row, int64_t panel, int64_t first) {
  const Layer& l = *t.layer;
  if (!l.bounded) return -1;
  const int64_t blocks = (l.depth + l.bound_depth - 1) / l.bound_depth, block = first / l.bound_depth;
  const float most = t.row_sums[row * blocks + block] * l.weight_bounds[panel * blocks + block];
  const T limit = Limits<T>::sum(l), step_limit = Limits<T>::step(l);
  if (!(most < static_cast<float>(limit)) || (step_limit >= 0 && most >= static_cast<float>(step_limit))) return -1;
  return limit - static_cast<T>(most) - 1;
}

/* Whether `count` sums from `acc` on, a multiple of V, are all that near to zero. */
template <class T>
LNS_INLINE bool within(const T* acc, int count, T room) {
  using Vector = typename Limits<T>::Vector;
  if (room < 0) return false;
  const auto most = all(room);
  vi outside = all(0);
  for (int i = 0; i < count; i += static_cast<int>(sizeof(Vector) / sizeof(T))) {
    const auto x = *(const Vector*)(acc + i);
    outside |= (vi)(x > most) | (vi)(-x > most);
  }
  return !any(outside);
}

/* ---- linear accumulation: products in registers ------------------------------------------------------ */

/* Float32 numbers 2^(code/γ) multiplied, the significand rounded to the remainder table's bits, the fraction dropped
 * (spec 4.1 to 4.3). lns_dot_create has checked that this gives every term of the table. */
struct Fp32 {
  using Scalar = float;
  using Vector = vf;
  using Sum = vi;
  using Element = int32_t;
  vi round_add, round_mask;
  explicit Fp32(const Layer& l) : round_add(all(l.round_add)), round_mask(all(l.round_mask)) {}
  static const float* weights(const Layer& l) { return l.weight_floats.data(); }
  LNS_INLINE vf rounded(vf w, float a) const {
    const vf product = w * a;
    return (vf)(add((vi)product, round_add) & round_mask);
  }
  LNS_INLINE vi term(vf w, float a) const { return __builtin_convertvector(rounded(w, a), vi); }
};

/* Mitchell's antilogarithm: the sum of two codes, put where a float32 has exponent and significand, is the product
 * (spec 4.1 with table_bits = 0). Signs are the top bits, and add up to their exclusive or. */
struct Mitchell {
  using Scalar = int32_t;
  using Vector = vi;
  using Sum = vi;
  using Element = int32_t;
  explicit Mitchell(const Layer&) {}
  static const int32_t* weights(const Layer& l) { return l.weight_ints.data(); }
  LNS_INLINE vi term(vi w, int32_t a) const { return __builtin_convertvector((vf)add(w, all(a)), vi); }
};

/* Terms looked up. Packed codes have the sign in the top bit, and numbers whose sum indexes the table, so that a pair
 * with a zero finds a zero (see pack_codes). */
struct Gather {
  using Scalar = int32_t;
  using Vector = vi;
  using Sum = vi;
  using Element = int32_t;
  const int32_t* table;
  explicit Gather(const Layer& l) : table(l.table.data()) {}
  static const int32_t* weights(const Layer& l) { return l.weight_ints.data(); }
  LNS_INLINE vi term(vi w, int32_t a) const {
    const vi both = add(w, all(a)), sign = both >> 31;
    return (gather(table, both & all(INT32_MAX)) ^ sign) - sign;
  }
};

LNS_INLINE vd truncated(vd x) {
#if defined(LNS_AVX512)
  return (vd)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif defined(LNS_AVX2)
  return (vd)_mm256_round_pd((__m256d)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  return __builtin_convertvector(__builtin_convertvector(x, vl), vd);
#endif
}

/* The same in float64, whose products are right for every γ and every number of bits that a table has; sums are
 * integers below 2^53 in float64 too. For accumulators above 32 bits, or tables finer than float32 computes. */
struct Fp64 {
  using Scalar = double;
  using Vector = vd;
  using Sum = vd;
  using Element = double;
  vl round_add, round_mask;
  explicit Fp64(const Layer& l) : round_add(all(l.wide_round_add)), round_mask(all(l.wide_round_mask)) {}
  static const double* weights(const Layer& l) { return l.weight_doubles.data(); }
  LNS_INLINE vd term(vd w, double a) const {
    const vd product = w * a;
    return truncated((vd)(((vl)product + round_add) & round_mask));
  }
};

/* Columns of a panel: two vectors. */
constexpr int kPanel = 2 * V;
/* Depth of a block: panel and rows stay in the first-level cache. */
constexpr int64_t kDepth = 256;

enum Mode { kWrap, kSaturate, kLanes };

template <class Product, int mode, int kRows>
LNS_INLINE void linear_block(const Product& product, const Layer& l, const typename Product::Scalar* a,
                             const typename Product::Scalar* w, int64_t depth, typename Product::Element* out,
                             int64_t stride) {
  using Vector = typename Product::Vector;
  using Sum = typename Product::Sum;
  using T = typename Product::Element;
  constexpr int kWidth = sizeof(Sum) / sizeof(T), kColumns = 2 * kWidth;
  Sum acc[kRows][2];
  const Sum limit = all(Limits<T>::sum(l)), step_limit = all(Limits<T>::step(l));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = *(const Sum*)(out + r * stride);
    acc[r][1] = *(const Sum*)(out + r * stride + kWidth);
  }
  const int64_t row = l.depth;
  if (mode == kLanes) {
    for (int64_t first = 0; first < depth; first += l.lanes) {
      const int64_t last = first + l.lanes < depth ? first + l.lanes : depth;
      Sum step[kRows][2] = {};
      for (int64_t k = first; k < last; ++k) {
        const Vector w0 = *(const Vector*)(w + k * kColumns), w1 = *(const Vector*)(w + k * kColumns + kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          step[r][0] = add(step[r][0], product.term(w0, a[r * row + k]));
          step[r][1] = add(step[r][1], product.term(w1, a[r * row + k]));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        acc[r][0] = clamp(add(acc[r][0], clamp(step[r][0], step_limit)), limit);
        acc[r][1] = clamp(add(acc[r][1], clamp(step[r][1], step_limit)), limit);
      }
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      const Vector w0 = *(const Vector*)(w + k * kColumns), w1 = *(const Vector*)(w + k * kColumns + kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        acc[r][0] = add(acc[r][0], product.term(w0, a[r * row + k]));
        acc[r][1] = add(acc[r][1], product.term(w1, a[r * row + k]));
        if (mode == kSaturate) {
          acc[r][0] = clamp(acc[r][0], limit);
          acc[r][1] = clamp(acc[r][1], limit);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    *(Sum*)(out + r * stride) = acc[r][0];
    *(Sum*)(out + r * stride + kWidth) = acc[r][1];
  }
}

/* The bias, or zero, in every row (spec 4.5). */
template <class T>
void begin(const Tile& t, T* acc, const std::vector<T>& start, int panel, int64_t panels) {
  const int64_t columns = (t.last_panel - t.first_panel) * panel;
  if (start.empty()) {
    std::memset(acc, 0, static_cast<size_t>(t.rows * columns) * sizeof(T));
    return;
  }
  const T* from = start.data() + t.group * panels * panel + t.first_panel * panel;
  for (int64_t r = 0; r < t.rows; ++r) std::memcpy(acc + r * columns, from, static_cast<size_t>(columns) * sizeof(T));
}

template <class T>
const std::vector<T>& starts(const Layer& l);
template <>
const std::vector<int32_t>& starts(const Layer& l) {
  return l.start32;
}
template <>
const std::vector<double>& starts(const Layer& l) {
  return l.start64;
}

template <class Product, int mode, int kRows>
void linear(const Tile& t) {
  const Layer& l = *t.layer;
  using T = typename Product::Element;
  constexpr int kColumns = 2 * static_cast<int>(sizeof(typename Product::Sum) / sizeof(T));
  const Product product(l);
  auto* acc = static_cast<T*>(t.acc);
  begin(t, acc, starts<T>(l), kColumns, l.panels);
  const int64_t columns = (t.last_panel - t.first_panel) * kColumns;
  const auto* a = static_cast<const typename Product::Scalar*>(t.a);
  const auto* w = Product::weights(l) + (t.group * l.panels + t.first_panel) * l.depth * kColumns;
  /* a step of lanes is never cut, nor a block whose sums are bounded */
  const int64_t unit = l.bounded ? l.bound_depth : mode == kLanes ? l.lanes : kDepth;
  const int64_t block = (kDepth + unit - 1) / unit * unit;
  for (int64_t start = 0; start < l.depth; start += block) {
    const int64_t end = std::min(start + block, l.depth);
    for (int64_t p = 0; p < t.last_panel - t.first_panel; ++p) {
      for (int64_t r = 0; r < t.rows; r += kRows) {
        T* const out = acc + r * columns + p * kColumns;
        const int64_t piece = mode == kWrap || !l.bounded ? block : unit;
        for (int64_t first = start; first < end; first += piece) {
          const auto* from = a + r * l.depth + first;
          const auto* panel = w + (p * l.depth + first) * kColumns;
          const int64_t depth = std::min(piece, end - first);
          bool clamps = mode != kWrap;
          if (mode != kWrap && l.bounded) {
            clamps = false;
            for (int64_t i = 0; i < kRows && !clamps; ++i) {
              clamps = !within(out + i * columns, kColumns,
                               room<T>(t, r + i, t.group * l.panels + t.first_panel + p, first));
            }
          }
          if (clamps) {
            linear_block<Product, mode, kRows>(product, l, from, panel, depth, out, columns);
          } else {
            linear_block<Product, kWrap, kRows>(product, l, from, panel, depth, out, columns);
          }
        }
      }
    }
  }
}

/* ---- linear accumulation: terms laid out ------------------------------------------------------------------- */

/* Where lane l of the lower and the upper vector of a butterfly comes from, of both. */
constexpr int butterfly(int bit, bool upper, int l) {
  return (l & bit) ? V + (upper ? l : l ^ bit) : (upper ? l ^ bit : l);
}

/* Clang has the one builtin only, and GCC before 12 the other. */
#if defined(__clang__)
template <int kBit, bool kUpper, int... l>
LNS_INLINE vi exchanged(vi a, vi b, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, butterfly(kBit, kUpper, l)...);
}
template <int kBit, bool kUpper>
LNS_INLINE vi exchanged(vi a, vi b) {
  return exchanged<kBit, kUpper>(a, b, std::make_integer_sequence<int, V>());
}
#else
template <int kBit, bool kUpper>
LNS_INLINE vi exchanged(vi a, vi b) {
  vi from;
  for (int l = 0; l < V; ++l) from[l] = butterfly(kBit, kUpper, l);
  return __builtin_shuffle(a, b, from);
}
#endif

/* A matrix of V by V, in place: butterflies over one bit of the index at a time. */
template <int kBit>
LNS_INLINE void transpose_bit(vi* m) {
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    if (i & kBit) continue;
    const vi a = m[i], b = m[i | kBit];
    m[i] = exchanged<kBit, false>(a, b);
    m[i | kBit] = exchanged<kBit, true>(a, b);
  }
}

LNS_INLINE void transpose(vi* m) {
  transpose_bit<1>(m);
  transpose_bit<2>(m);
  if (V > 4) transpose_bit<(V > 4 ? 4 : 1)>(m);
  if (V > 8) transpose_bit<(V > 8 ? 8 : 1)>(m);
}

/* All terms of one weight vector: row c holds those of activation code c, row 128 + c their negatives. For each
 * column they are consecutive in the table of terms, so blocks of it are transposed. */
LNS_INLINE void expand(const Tile& t, const int16_t* codes, int32_t* rows) {
  const Layer& l = *t.layer;
  const int64_t from = t.least_code / V * V;
  for (int half = 0; half < 2; ++half) {
    const int32_t* stream[V];
    vi sign;
    for (int c = 0; c < V; ++c) {
      const int code = codes[half * V + c];
      stream[c] = l.term_stream.data() + (code ? (code < 0 ? -code : code) : l.zero_stream);
      sign[c] = code < 0 ? -1 : 0;
    }
    for (int64_t c = from; c <= t.largest_code; c += V) {
      vi m[V];
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) m[i] = *(const vi_anywhere*)(stream[i] + c);
      transpose(m);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) {
        const vi term = (m[i] ^ sign) - sign;
        *(vi*)(rows + (c + i) * kPanel + half * V) = term;
        *(vi*)(rows + (expanded_codes + c + i) * kPanel + half * V) = -term;
      }
    }
    *(vi*)(rows + half * V) = all(0);
  }
}

template <int mode>
void expanded(const Tile& t) {
  constexpr int64_t kStep = expanded_depth;
  constexpr int64_t kRow = 2 * expanded_codes * kPanel;
  const Layer& l = *t.layer;
  auto* acc = static_cast<int32_t*>(t.acc);
  begin(t, acc, l.expanded_start, kPanel, l.expanded_panels);
  static_assert(kStep * kRow * sizeof(int32_t) <= terms_bytes, "the terms of a block fit");
  int32_t* const rows = t.terms;
  const auto* a = static_cast<const uint16_t*>(t.a);
  const int16_t* codes = l.weight_codes.data() + (t.group * l.expanded_panels + t.first_panel) * l.depth * kPanel;
  const vi limit = all(l.limit);
  for (int64_t first = 0; first < l.depth; first += kStep) {
    const int64_t depth = l.depth - first < kStep ? l.depth - first : kStep;
    for (int64_t k = 0; k < depth; ++k) expand(t, codes + (first + k) * kPanel, rows + k * kRow);
    /* the depth that is missing has activations of zero */
    for (int64_t k = depth; k < kStep; ++k) std::memset(rows + k * kRow, 0, kPanel * sizeof(int32_t));
    const uint16_t* block = a + first * t.rows;
    for (int64_t r = 0; r < t.rows; ++r) {
      vi sum0 = *(vi*)(acc + r * kPanel), sum1 = *(vi*)(acc + r * kPanel + V);
#pragma GCC unroll 4
      for (int64_t k = 0; k < kStep; ++k) {
        const auto* term = (const int32_t*)((const char*)(rows + k * kRow) + block[r * kStep + k]);
        sum0 = add(sum0, *(const vi*)term);
        sum1 = add(sum1, *(const vi*)(term + V));
        if (mode == kSaturate) sum0 = clamp(sum0, limit), sum1 = clamp(sum1, limit);
      }
      *(vi*)(acc + r * kPanel) = sum0;
      *(vi*)(acc + r * kPanel + V) = sum1;
    }
  }
}

/* Where terms of one octave are those of the next, shifted (truncation composes): the terms of the highest octave are
 * laid out, γ rows for each sign that occurs, and a product is a load and a shift. Activations of zero are left out. */
typedef int16_t vs_anywhere __attribute__((vector_size(kBytes / 2), may_alias, aligned(2)));
typedef uint8_t vb __attribute__((vector_size(kBytes), may_alias));

#if defined(LNS_AVX2)
constexpr int64_t kShiftedRows = 24;
#elif defined(LNS_AVX512)
constexpr int64_t kShiftedRows = 64;
#else
constexpr int64_t kShiftedRows = 192;
#endif

/* Terms of some weights with the codes of the highest octave, in order: the magnitudes, zero for a weight of zero. */
class Octave {
 public:
#if defined(LNS_AVX2)
  explicit Octave(const Layer& l) : stream_(l), permutes_(l.octave_first >= 0), table_(_mm256_setzero_si256()) {
    if (permutes_) table_ = _mm256_loadu_si256((const __m256i*)l.octave);
    while ((int64_t{1} << log2_gamma_) < l.gamma) ++log2_gamma_;
    first_ = l.octave_first;
  }
  template <class Put>
  LNS_INLINE void operator()(vi magnitude, Put put) const {
    if (!permutes_) return stream_(magnitude, put);
    /* how many codes a sum is below the last of the highest octave: its low bits choose a remainder, the others say by
     * how much to shift; all is shifted out for a weight of zero */
    vi below = magnitude != 0 ? all(first_) - magnitude : all(1 << 24);
    for (int64_t r = 0; r < stream_.gamma; ++r, below -= 1) {
      put(r, (vi)_mm256_srlv_epi32(_mm256_permutevar8x32_epi32(table_, (__m256i)below),
                                   _mm256_srli_epi32((__m256i)below, log2_gamma_)));
    }
  }
#else
  explicit Octave(const Layer& l) : stream_(l) {}
  template <class Put>
  LNS_INLINE void operator()(vi magnitude, Put put) const {
    stream_(magnitude, put);
  }
#endif

 private:
  struct Stream {
    const int32_t* terms;
    int64_t gamma;
    vi highest, zeros;
    explicit Stream(const Layer& l)
        : terms(l.term_stream.data()),
          gamma(l.gamma),
          highest(all(static_cast<int32_t>(max_code(l.activation) * l.activation_widen - l.gamma + 1))),
          zeros(all(static_cast<int32_t>(l.zero_stream))) {}
    template <class Put>
    LNS_INLINE void operator()(vi magnitude, Put put) const {
      vi index = magnitude != 0 ? highest + magnitude : zeros;
      for (int64_t r = 0; r < gamma; ++r, index += 1) put(r, gather(terms, index));
    }
  } stream_;
#if defined(LNS_AVX2)
  bool permutes_;
  int log2_gamma_ = 0;
  int32_t first_;
  __m256i table_;
#endif
};

constexpr int kShiftedColumns = 4 * V;

/* kTruncates: negative terms are one's complements, whose arithmetic shift is that of the magnitude but for −1;
 * `lacking` has a row of ones for them for either sign of the activation. Else shifts lose nothing. */
template <bool kTruncates>
LNS_INLINE void lay_out(const Tile& t, const Octave& octave, const int16_t* codes, int32_t* rows, uint8_t* lacking) {
  const int64_t other = t.layer->gamma * kShiftedColumns;
  for (int j = 0; j < 4; ++j) {
    const vi code = __builtin_convertvector(*(const vs_anywhere*)(codes + j * V), vi);
    const vi sign = code >> 31, used = code != 0;
    int32_t* const to = rows + j * V;
    octave((code ^ sign) - sign, [&](int64_t r, vi term) __attribute__((always_inline)) {
      const vi one = kTruncates ? term ^ sign : (term ^ sign) - sign;
      *(vi*)(to + r * kShiftedColumns) = one;
      if (t.both_signs) *(vi*)(to + other + r * kShiftedColumns) = kTruncates ? ~one & used : -one;
    });
  }
  if (kTruncates) {
    for (int c = 0; c < kShiftedColumns; ++c) lacking[c] = codes[c] < 0;
    if (t.both_signs) {
      for (int c = 0; c < kShiftedColumns; ++c) lacking[kShiftedColumns + c] = codes[c] > 0;
    }
  }
}

/* What negative terms of all rows lack, counted in bytes, added to their sums. */
void settle(const Tile& t, int32_t* acc) {
  for (int64_t i = 0; i < t.rows * kShiftedColumns; ++i) acc[i] += t.lacking[i];
  std::memset(t.lacking, 0, static_cast<size_t>(t.rows * kShiftedColumns));
}

/* kWide: accumulators are a multiple of 2^unit, modulo 2^32, and a lower part. Activations of high octaves add to the
 * former alone; those of low ones add up for a block of depth, and are then split. */
template <bool kTruncates, bool kWide>
void shifted_with(const Tile& t) {
  const Layer& l = *t.layer;
  const Octave octave(l);
  auto* acc = static_cast<int32_t*>(t.acc);
  begin(t, acc, l.expanded_start, kShiftedColumns, l.expanded_panels);
  if (kWide) begin(t, t.low, l.low_start, kShiftedColumns, l.expanded_panels);
  if (kTruncates) std::memset(t.lacking, 0, static_cast<size_t>(t.rows * kShiftedColumns));
  const int64_t step = t.block_depth, signs = t.both_signs ? 2 : 1, row = signs * l.gamma * kShiftedColumns;
  auto* const lacking = (uint8_t*)t.terms + terms_bytes;
  int lacking_shift = 2;
  while ((int64_t{4} << lacking_shift) < l.gamma * 16) ++lacking_shift;
  const int64_t panel = t.group * l.expanded_panels + t.first_panel;
  const int16_t* const codes = l.weight_codes.data() + panel * l.depth * kShiftedColumns;
  const int unit = l.unit;
  const vi low_bits = all((1 << unit) - 1);
  int64_t counted = 0;
  for (int64_t first = 0, block = 0; first < l.depth; first += step, ++block) {
    for (int64_t k = 0; k < std::min(step, l.depth - first); ++k) {
      lay_out<kTruncates>(t, octave, codes + (first + k) * kShiftedColumns, t.terms + k * row,
                          lacking + k * signs * kShiftedColumns);
    }
    if (kTruncates && counted + step > UINT8_MAX) settle(t, acc), counted = 0;
    counted += step;
    const ShiftedEntry* entries = t.entries + block * t.rows * step;
    const uint8_t* filled = t.filled + block * t.rows * 2;
    for (int64_t r = 0; r < t.rows; ++r, entries += step, filled += 2) {
      int32_t* const out = acc + r * kShiftedColumns;
      vi sum[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] = *(const vi*)(out + j * V);
      vb lack = {};
      if (kTruncates) lack = *(const vb*)(t.lacking + r * kShiftedColumns);
      for (const ShiftedEntry *e = entries, *end = entries + filled[0]; e < end; ++e) {
        const auto* term = (const vi*)((const char*)t.terms + e->row);
        const int shift = static_cast<int>(e->shift);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], term[j] >> shift);
        if (kTruncates) lack += *(const vb*)(lacking + ((e->row >> lacking_shift) & -kShiftedColumns));
      }
      if (kWide && filled[1]) {
        vi some[4] = {};
        for (const ShiftedEntry *end = entries + step, *e = end - filled[1]; e < end; ++e) {
          const auto* term = (const vi*)((const char*)t.terms + e->row);
          const int shift = static_cast<int>(e->shift & ((1 << shifted_left) - 1));
          const int left = static_cast<int>(e->shift >> shifted_left);
          const vi lost = all((1 << shift) - 1);
          /* towards zero */
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const vi one = (vi)((vu)term[j] << left);
            some[j] += (one + ((one >> 31) & lost)) >> shift;
          }
        }
        int32_t* const low = t.low + r * kShiftedColumns;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sum[j] = add(sum[j], some[j] >> unit);
          *(vi*)(low + j * V) += some[j] & low_bits;
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) *(vi*)(out + j * V) = sum[j];
      if (kTruncates) *(vb*)(t.lacking + r * kShiftedColumns) = lack;
    }
  }
  if (kTruncates) settle(t, acc);
}

void shifted(const Tile& t) {
  const Layer& l = *t.layer;
  if (l.unit) return shifted_with<false, true>(t);
  return l.truncates ? shifted_with<true, false>(t) : shifted_with<false, false>(t);
}

/* Terms too large for 32 bits, summed in float64 as integers below 2^53. */
LNS_INLINE vf truncated(vf x) {
#if defined(LNS_AVX512)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif defined(LNS_AVX2)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  vf whole;
  for (int i = 0; i < V; ++i) whole[i] = std::trunc(x[i]);
  return whole;
#endif
}

typedef float half_vf __attribute__((vector_size(kBytes / 2), may_alias));

LNS_INLINE void add_wide(vd* acc, vf x) {
  union {
    vf whole;
    half_vf half[2];
  } parts = {x};
  acc[0] += __builtin_convertvector(parts.half[0], vd);
  acc[1] += __builtin_convertvector(parts.half[1], vd);
}

void fp32_wide(const Tile& t) {
  constexpr int kRows = 2;
  const Layer& l = *t.layer;
  const Fp32 product(l);
  auto* acc = static_cast<double*>(t.acc);
  begin(t, acc, l.start64, kPanel, l.panels);
  const int64_t columns = (t.last_panel - t.first_panel) * kPanel;
  const auto* a = static_cast<const float*>(t.a);
  const float* w = l.weight_floats.data() + (t.group * l.panels + t.first_panel) * l.depth * kPanel;
  for (int64_t p = 0; p < t.last_panel - t.first_panel; ++p) {
    for (int64_t r = 0; r < t.rows; r += kRows) {
      vd sum[kRows][4];
      double* out = acc + r * columns + p * kPanel;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < 4; ++j) sum[i][j] = *(const vd*)(out + i * columns + j * (V / 2));
      }
      for (int64_t k = 0; k < l.depth; ++k) {
        const vf w0 = *(const vf*)(w + (p * l.depth + k) * kPanel),
                 w1 = *(const vf*)(w + (p * l.depth + k) * kPanel + V);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const float x = a[(r + i) * l.depth + k];
          add_wide(sum[i], truncated(product.rounded(w0, x)));
          add_wide(sum[i] + 2, truncated(product.rounded(w1, x)));
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < 4; ++j) *(vd*)(out + i * columns + j * (V / 2)) = sum[i][j];
      }
    }
  }
}

/* Remainder bins (spec 4.1): the bins of one sum are the lanes of a vector. A table holds, for every code sum and sign,
 * the vector that a product adds: its term in its bin, zeros elsewhere. So a product is one load and one addition
 * however many bins there are, and clamping after it costs no more than for one. */
template <int E>
struct Lanes {
  typedef int32_t Vector __attribute__((vector_size(E * 4), may_alias));
  typedef uint32_t Unsigned __attribute__((vector_size(E * 4), may_alias));
  typedef double Doubles __attribute__((vector_size(E * 8), may_alias));
  static LNS_INLINE Vector all(int32_t x) { return x - Vector{}; }
  static LNS_INLINE Vector add(Vector a, Vector b) { return (Vector)((Unsigned)a + (Unsigned)b); }
  static LNS_INLINE Vector clamp(Vector x, Vector limit) {
    x = x < limit ? x : limit;
    return x > -limit ? x : -limit;
  }
};

/* The products of one activation and some columns. */
template <int E, class Index, int kColumns>
LNS_INLINE void add_bins(const char* table, const char* panel, uint64_t entry, typename Lanes<E>::Vector* to) {
  using Vector = typename Lanes<E>::Vector;
  /* see bin_entries: the low half says where in the table, the high one which record */
  const char* from = table + static_cast<uint32_t>(entry);
  const auto* record = (const Index*)(panel + (entry >> 32));
  /* one register each, or every product adds the table's place anew */
  __asm__("" : "+r"(from), "+r"(record));
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) to[c] = Lanes<E>::add(to[c], *(const Vector*)(from + uint64_t{record[c]} * 8));
}

/* Products between two looks at the sums. */
constexpr int64_t kLook = 4;

/* As bins_block without clamps, where these provably do nothing: sums are looked at every few products, and have to be
 * so near to zero that those between could not have left the range. Sums in memory change only if so. */
template <int E, class Index>
LNS_INLINE bool bins_checked(const Layer& l, const uint64_t* entries, int64_t count, const char* panel, int32_t* out,
                             int32_t room) {
  using Vector = typename Lanes<E>::Vector;
  const char* const table = (const char*)l.table.data();
  Vector sum[bins_panel], most = Lanes<E>::all(0);
#pragma GCC unroll 8
  for (int c = 0; c < bins_panel; ++c) sum[c] = *(const Vector*)(out + c * E);
  const auto look = [&]() __attribute__((always_inline)) {
    Vector some[bins_panel];
#pragma GCC unroll 8
    for (int c = 0; c < bins_panel; ++c) {
      some[c] = -sum[c];
      some[c] = sum[c] > some[c] ? sum[c] : some[c];
    }
#pragma GCC unroll 8
    for (int step = 1; step < bins_panel; step *= 2) {
#pragma GCC unroll 8
      for (int c = 0; c < bins_panel; c += 2 * step) some[c] = some[c] > some[c + step] ? some[c] : some[c + step];
    }
    most = most > some[0] ? most : some[0];
  };
  int64_t i = 0;
  for (; i + kLook <= count; i += kLook) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kLook; ++j) add_bins<E, Index, bins_panel>(table, panel, entries[i + j], sum);
    look();
  }
  for (; i < count; ++i) add_bins<E, Index, bins_panel>(table, panel, entries[i], sum);
  look();
  int32_t largest = 0;
#pragma GCC unroll 16
  for (int e = 0; e < E; ++e) largest = largest > most[e] ? largest : most[e];
  if (largest > room) return false;
#pragma GCC unroll 8
  for (int c = 0; c < bins_panel; ++c) *(Vector*)(out + c * E) = sum[c];
  return true;
}

/* Some depth of one row and one panel, into sums that lie in memory. */
template <int E, class Index, Mode mode, int kColumns>
LNS_INLINE void bins_block(const Layer& l, const uint64_t* entries, int64_t count, const char* panel, int32_t* out) {
  using Vector = typename Lanes<E>::Vector;
  const char* const table = (const char*)l.table.data();
  const Vector limit = Lanes<E>::all(l.limit), step_limit = Lanes<E>::all(l.step_limit);
  Vector sum[kColumns], step[kColumns];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) sum[c] = *(const Vector*)(out + c * E);
  const auto add_term = [&](uint64_t entry, Vector* to)
                            __attribute__((always_inline)) { add_bins<E, Index, kColumns>(table, panel, entry, to); };
  if (mode == kLanes) {
    for (int64_t first = 0; first < count; first += l.lanes) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) step[c] = Lanes<E>::all(0);
      for (int64_t i = first; i < std::min<int64_t>(first + l.lanes, count); ++i) add_term(entries[i], step);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        sum[c] = Lanes<E>::clamp(Lanes<E>::add(sum[c], Lanes<E>::clamp(step[c], step_limit)), limit);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      add_term(entries[i], sum);
      if (mode == kSaturate) {
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) sum[c] = Lanes<E>::clamp(sum[c], limit);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) *(Vector*)(out + c * E) = sum[c];
}

template <int E, class Index, Mode mode>
LNS_INLINE void bins_with(const Tile& t) {
  /* vector steps hold a second set of sums */
  constexpr int kColumns = mode == kLanes ? bins_panel / 2 : bins_panel;
  constexpr int64_t kRecord = 2 * bins_panel * sizeof(Index);
  const Layer& l = *t.layer;
  const auto* a = static_cast<const uint64_t*>(t.a);
  auto* acc = static_cast<int32_t*>(t.acc);
  const int64_t panels = t.last_panel - t.first_panel;
  std::memset(acc, 0, static_cast<size_t>(t.rows * panels) * bins_panel * E * sizeof(int32_t));
  const int64_t unit = l.bin_block, block = (kDepth + unit - 1) / unit * unit;
  const int64_t blocks = (l.depth + unit - 1) / unit;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = t.group * l.panels + t.first_panel + p;
    const char* const panel = l.weight_records.data() + at * (l.depth + 1) * kRecord;
    if (!l.start32.empty()) {
      for (int64_t r = 0; r < t.rows; ++r) {
        for (int c = 0; c < bins_panel; ++c) {
          acc[((r * panels + p) * bins_panel + c) * E] = l.start32[static_cast<size_t>(at * bins_panel + c)];
        }
      }
    }
    for (int64_t start = 0; start < l.depth; start += block) {
      for (int64_t r = 0; r < t.rows; ++r) {
        int32_t* const out = acc + (r * panels + p) * bins_panel * E;
        for (int64_t first = start; first < std::min(start + block, l.depth); first += unit) {
          const uint64_t* entries = a + r * l.depth + first;
          const int64_t count = t.entry_counts[r * blocks + first / unit];
          bool done = false;
          if (mode == kWrap ||
              (mode == kLanes && l.bounded && within(out, bins_panel * E, room<int32_t>(t, r, at, first)))) {
            bins_block<E, Index, kWrap, bins_panel>(l, entries, count, panel, out);
            done = true;
          } else if (mode == kSaturate && l.bounded) {
            const int64_t block = first / unit;
            const float between = (kLook - 1) * (t.row_sums[r * blocks + block] * l.weight_bounds[at * blocks + block]);
            if (between < static_cast<float>(l.limit)) {
              const int32_t near = l.limit - static_cast<int32_t>(between) - 1;
              done = bins_checked<E, Index>(l, entries, count, panel, out, near);
            }
          }
          if (!done) {
            for (int c = 0; c < bins_panel; c += kColumns) {
              bins_block<E, Index, mode, kColumns>(l, entries, count, panel + c * sizeof(Index), out + c * E);
            }
          }
        }
      }
    }
  }
}

template <int E, class Index>
void bins_as(const Tile& t) {
  const Layer& l = *t.layer;
  if (!l.saturate) return bins_with<E, Index, kWrap>(t);
  if (l.step_limit < 0) return bins_with<E, Index, kSaturate>(t);
  return bins_with<E, Index, kLanes>(t);
}

template <int E>
void bins_of(const Tile& t) {
  return t.layer->short_records ? bins_as<E, uint16_t>(t) : bins_as<E, uint32_t>(t);
}

void bins(const Tile& t) {
  switch (t.layer->bin_stride) {
    case 4:
      return bins_of<4>(t);
    case 8:
      return bins_of<8>(t);
    default:
      return bins_of<16>(t);
  }
}

/* ---- log accumulation -------------------------------------------------------------------------------------- */

struct Signed {
  vi code, sign; /* sign: all ones or zero */
};

/* The Gaussian logarithms (spec 5.2, 5.3). */
template <bool kStepped>
struct Adder {
  const int32_t* delta;
  vi end, size, largest;
  int shift;
  explicit Adder(const Layer& l)
      : delta(l.delta.data()),
        end(all(static_cast<int32_t>(l.delta_size - 1))),
        size(all(static_cast<int32_t>(l.delta_size))),
        largest(all(l.largest)),
        shift(l.delta_shift) {}
  LNS_INLINE Signed operator()(Signed x, Signed y) const {
    const vi big = most(x.code, y.code), small = least(x.code, y.code);
    const vi distance = big - small, differ = x.sign ^ y.sign;
    const vi index = least(kStepped ? distance >> shift : distance, end) + (differ & size);
    vi total = least(big + gather(delta, index), largest);
    /* without steps, the entry for cancellation is below all codes */
    const vi none = kStepped ? (vi)(total < 1) | ((vi)(distance == 0) & differ) : (vi)(total < 1);
    total = none ? all(no_code) : total;
    return {total, y.code > x.code ? y.sign : x.sign};
  }
};

/* Rows side by side: a sum waits for the one before it. */
constexpr int kChains = 4;

template <bool kStepped>
void log32_with(const Tile& t) {
  const Layer& l = *t.layer;
  const Adder<kStepped> sum_of(l);
  auto* acc = static_cast<int32_t*>(t.acc);
  const int64_t panels = t.last_panel - t.first_panel;
  const auto* a = static_cast<const int32_t*>(t.a);
  const int32_t* w = l.weight_ints.data() + (t.group * l.panels + t.first_panel) * l.depth * 2 * V;
  const int guard = l.guard_bits;
  const vi top = all((l.largest >> guard) + 1), largest = all(l.largest);
  const auto entry = [&](const int32_t* activation, const int32_t* weight) __attribute__((always_inline)) {
    /* spec 5.1 */
    const vi x = least(add(all(activation[0]), *(const vi*)weight), top);
    const vi scaled = least(x << guard, largest);
    return Signed{x < 1 ? all(no_code) : scaled, all(activation[1]) ^ *(const vi*)(weight + V)};
  };
  for (int64_t p = 0; p < panels; ++p) {
    const int32_t* panel = w + p * l.depth * 2 * V;
    const int64_t column = (t.group * l.panels + t.first_panel + p) * V;
    for (int64_t r = 0; r < t.rows; r += kChains) {
      const int32_t* row[kChains];
      Signed sum[kChains];
      for (int i = 0; i < kChains; ++i) {
        row[i] = a + (r + i) * l.depth * 2;
        sum[i].code = l.start_code.empty() ? all(no_code) : *(const vi_anywhere*)(l.start_code.data() + column);
        sum[i].sign = l.start_code.empty() ? all(0) : *(const vi_anywhere*)(l.start_minus.data() + column);
      }
      if (l.lanes == 1) {
        for (int64_t k = 0; k < l.depth; ++k) {
#pragma GCC unroll 8
          for (int i = 0; i < kChains; ++i) sum[i] = sum_of(sum[i], entry(row[i] + 2 * k, panel + k * 2 * V));
        }
      } else {
        for (int i = 0; i < kChains; ++i) {
          Signed level[1024];
          for (int64_t first = 0; first < l.depth; first += l.lanes) {
            int64_t count = l.depth - first < l.lanes ? l.depth - first : l.lanes;
            for (int64_t j = 0; j < count; ++j) level[j] = entry(row[i] + 2 * (first + j), panel + (first + j) * 2 * V);
            while (count > 1) { /* spec 5.4 */
              for (int64_t j = 0; j < count / 2; ++j) level[j] = sum_of(level[2 * j], level[2 * j + 1]);
              if (count % 2) level[count / 2] = level[count - 1];
              count = (count + 1) / 2;
            }
            sum[i] = sum_of(sum[i], level[0]);
          }
        }
      }
      for (int i = 0; i < kChains; ++i) {
        int32_t* out = acc + ((r + i) * panels + p) * 2 * V;
        *(vi*)out = sum[i].code;
        *(vi*)(out + V) = sum[i].sign;
      }
    }
  }
}

void log32(const Tile& t) { return t.layer->delta_shift ? log32_with<true>(t) : log32_with<false>(t); }

/* Narrow lanes, of bytes or of 16 bits, for codes of at most 7 or 15 bits. A lane holds a code less 128 or 32768, so
 * that zero is the least integer there is, and saturating additions give it for every sum that is below code 1. */
#if defined(LNS_AVX512) || defined(LNS_AVX2)

#if defined(LNS_AVX512)
template <class T>
struct Narrow;

template <>
struct Narrow<int8_t> {
  using Vector = __m512i;
  using Mask = __mmask64;
  static LNS_INLINE Vector all(int8_t x) { return _mm512_set1_epi8(x); }
  static LNS_INLINE Vector adds(Vector a, Vector b) { return _mm512_adds_epi8(a, b); }
  static LNS_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_epi8(a, b); }
  static LNS_INLINE Vector most(Vector a, Vector b) { return _mm512_max_epi8(a, b); }
  static LNS_INLINE Vector least(Vector a, Vector b) { return _mm512_min_epi8(a, b); }
  static LNS_INLINE Mask above(Vector a, Vector b) { return _mm512_cmpgt_epi8_mask(a, b); }
  static LNS_INLINE Mask negative(Vector a) { return _mm512_movepi8_mask(a); }
  static LNS_INLINE Mask both(Mask m, Vector a) { return _mm512_mask_testn_epi8_mask(m, a, a); }
  static LNS_INLINE Vector chosen(Mask m, Vector a, Vector b) { return _mm512_mask_mov_epi8(b, m, a); }
  static LNS_INLINE Vector adds_where(Mask m, Vector a, Vector b) { return _mm512_mask_adds_epi8(a, m, a, b); }
};

template <>
struct Narrow<int16_t> {
  using Vector = __m512i;
  using Mask = __mmask32;
  static LNS_INLINE Vector all(int16_t x) { return _mm512_set1_epi16(x); }
  static LNS_INLINE Vector adds(Vector a, Vector b) { return _mm512_adds_epi16(a, b); }
  static LNS_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_epi16(a, b); }
  static LNS_INLINE Vector most(Vector a, Vector b) { return _mm512_max_epi16(a, b); }
  static LNS_INLINE Vector least(Vector a, Vector b) { return _mm512_min_epi16(a, b); }
  static LNS_INLINE Mask above(Vector a, Vector b) { return _mm512_cmpgt_epi16_mask(a, b); }
  static LNS_INLINE Mask negative(Vector a) { return _mm512_movepi16_mask(a); }
  static LNS_INLINE Mask both(Mask m, Vector a) { return _mm512_mask_testn_epi16_mask(m, a, a); }
  static LNS_INLINE Vector chosen(Mask m, Vector a, Vector b) { return _mm512_mask_mov_epi16(b, m, a); }
  static LNS_INLINE Vector adds_where(Mask m, Vector a, Vector b) { return _mm512_mask_adds_epi16(a, m, a, b); }
};

template <class T>
struct Memory : Narrow<T> {
  using Vector = __m512i;
  static LNS_INLINE Vector spread(int32_t x) { return _mm512_set1_epi32(x); }
  static LNS_INLINE Vector load(const T* x) { return _mm512_loadu_si512(x); }
  static LNS_INLINE void store(T* to, Vector x) { _mm512_storeu_si512(to, x); }
  static LNS_INLINE Vector exclusive(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
};

/* Δ by distance, for lanes whose signs agree or differ; what it is for the distance to a zero does not matter. */
struct Bytes {
  using Lane = int8_t;
  __m512i plus, minus;
  explicit Bytes(const Layer& l) : plus(_mm512_loadu_si512(l.delta8[0])), minus(_mm512_loadu_si512(l.delta8[1])) {}
  LNS_INLINE __m512i operator()(__m512i distance, __mmask64 differ) const {
    /* the last entry is zero */
    const __m512i index = _mm512_min_epu8(distance, _mm512_set1_epi8(63));
    return _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(index, plus), differ, index, minus);
  }
};

/* By 16 bits, up to 32 steps in one register or 64 in two. */
template <int kRegisters>
struct Words {
  using Lane = int16_t;
  __m512i plus[kRegisters], minus[kRegisters], shift;
  explicit Words(const Layer& l) : shift(_mm512_set1_epi16(static_cast<int16_t>(l.delta_shift))) {
    for (int i = 0; i < kRegisters; ++i) {
      plus[i] = _mm512_loadu_si512(l.delta16 + 32 * i);
      minus[i] = _mm512_loadu_si512(l.delta16 + l.delta_size + 32 * i);
    }
  }
  LNS_INLINE __m512i operator()(__m512i distance, __mmask32 differ) const {
    const __m512i index = _mm512_min_epu16(_mm512_srlv_epi16(distance, shift), _mm512_set1_epi16(32 * kRegisters - 1));
    if (kRegisters == 1) {
      return _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(index, plus[0]), differ, index, minus[0]);
    }
    constexpr int last = kRegisters - 1;
    return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(plus[0], index, plus[last]), differ,
                                 _mm512_permutex2var_epi16(minus[0], index, minus[last]));
  }
};

/* Any number of steps, in memory. */
struct LookedUp {
  using Lane = int16_t;
  const int16_t* table;
  __m512i shift, end, size;
  explicit LookedUp(const Layer& l)
      : table(l.delta16),
        shift(_mm512_set1_epi16(static_cast<int16_t>(l.delta_shift))),
        end(_mm512_set1_epi16(static_cast<int16_t>(l.delta_size - 1))),
        size(_mm512_set1_epi16(static_cast<int16_t>(l.delta_size))) {}
  LNS_INLINE __m512i operator()(__m512i distance, __mmask32 differ) const {
    __m512i index = _mm512_min_epu16(_mm512_srlv_epi16(distance, shift), end);
    index = _mm512_mask_add_epi16(index, differ, index, size);
    const __m512i even = _mm512_and_si512(index, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(index, 16);
    /* 32 bits from an entry on for the even lanes, and up to it for the odd ones */
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_i32gather_epi32(even, table, 2),
                                   _mm512_i32gather_epi32(odd, table - 1, 2));
  }
};
#else
template <class T>
struct Narrow;

template <>
struct Narrow<int8_t> {
  using Vector = __m256i;
  static LNS_INLINE Vector all(int8_t x) { return _mm256_set1_epi8(x); }
  static LNS_INLINE Vector adds(Vector a, Vector b) { return _mm256_adds_epi8(a, b); }
  static LNS_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_epi8(a, b); }
  static LNS_INLINE Vector most(Vector a, Vector b) { return _mm256_max_epi8(a, b); }
  static LNS_INLINE Vector least(Vector a, Vector b) { return _mm256_min_epi8(a, b); }
  static LNS_INLINE Vector above(Vector a, Vector b) { return _mm256_cmpgt_epi8(a, b); }
  static LNS_INLINE Vector equal(Vector a, Vector b) { return _mm256_cmpeq_epi8(a, b); }
};

template <>
struct Narrow<int16_t> {
  using Vector = __m256i;
  static LNS_INLINE Vector all(int16_t x) { return _mm256_set1_epi16(x); }
  static LNS_INLINE Vector adds(Vector a, Vector b) { return _mm256_adds_epi16(a, b); }
  static LNS_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
  static LNS_INLINE Vector most(Vector a, Vector b) { return _mm256_max_epi16(a, b); }
  static LNS_INLINE Vector least(Vector a, Vector b) { return _mm256_min_epi16(a, b); }
  static LNS_INLINE Vector above(Vector a, Vector b) { return _mm256_cmpgt_epi16(a, b); }
  static LNS_INLINE Vector equal(Vector a, Vector b) { return _mm256_cmpeq_epi16(a, b); }
};

/* Masks are vectors here. */
template <class T>
struct Memory : Narrow<T> {
  using Vector = __m256i;
  using Mask = __m256i;
  using Base = Narrow<T>;
  static LNS_INLINE Vector spread(int32_t x) { return _mm256_set1_epi32(x); }
  static LNS_INLINE Vector load(const T* x) { return _mm256_loadu_si256((const __m256i*)x); }
  static LNS_INLINE void store(T* to, Vector x) { _mm256_storeu_si256((__m256i*)to, x); }
  static LNS_INLINE Vector exclusive(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static LNS_INLINE Mask negative(Vector a) { return a; }
  static LNS_INLINE Mask both(Mask m, Vector a) { return _mm256_and_si256(m, Base::equal(a, _mm256_setzero_si256())); }
  static LNS_INLINE Vector chosen(Mask m, Vector a, Vector b) { return _mm256_blendv_epi8(b, a, m); }
  static LNS_INLINE Vector adds_where(Mask m, Vector a, Vector b) { return Base::adds(a, _mm256_and_si256(m, b)); }
};

/* Δ by distance, for lanes whose signs agree or differ; what it is for the distance to a zero does not matter. Sixteen
 * entries to a segment. */
template <int kSegments>
struct Bytes {
  using Lane = int8_t;
  __m256i plus[kSegments], minus[kSegments];
  explicit Bytes(const Layer& l) {
    for (int s = 0; s < kSegments; ++s) {
      plus[s] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(l.delta8[0] + 16 * s)));
      minus[s] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(l.delta8[1] + 16 * s)));
    }
  }
  LNS_INLINE __m256i operator()(__m256i distance, __m256i differ) const {
    /* the top bit of an index makes pshufb give zero: it is set outside of the segment */
    __m256i same = _mm256_setzero_si256(), other = same;
#pragma GCC unroll 4
    for (int s = 0; s < kSegments; ++s) {
      const __m256i index = _mm256_adds_epu8(_mm256_sub_epi8(distance, _mm256_set1_epi8(static_cast<char>(16 * s))),
                                             _mm256_set1_epi8(112));
      same = _mm256_or_si256(same, _mm256_shuffle_epi8(plus[s], index));
      other = _mm256_or_si256(other, _mm256_shuffle_epi8(minus[s], index));
    }
    return _mm256_blendv_epi8(same, other, differ);
  }
};

template <int kSegments>
struct Words {
  using Lane = int16_t;
  __m256i plus[kSegments][2], minus[kSegments][2]; /* low and high bytes */
  __m128i shift;
  explicit Words(const Layer& l) : shift(_mm_cvtsi32_si128(l.delta_shift)) {
    for (int s = 0; s < kSegments; ++s) {
      for (int high = 0; high < 2; ++high) {
        alignas(16) int8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
          for (int j = 0; j < 2; ++j) {
            bytes[j][i] = static_cast<int8_t>(l.delta16[j * l.delta_size + 16 * s + i] >> (8 * high));
          }
        }
        plus[s][high] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[0]));
        minus[s][high] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[1]));
      }
    }
  }
  LNS_INLINE __m256i operator()(__m256i distance, __m256i differ) const {
    const auto all = [](int16_t x) { return _mm256_set1_epi16(x); };
    /* the index in the low byte; the high one has the top bit, for which pshufb gives zero */
    const __m256i index = _mm256_or_si256(_mm256_min_epu16(_mm256_srl_epi16(distance, shift), all(127)), all(-32768));
    __m256i same = _mm256_setzero_si256(), other = same;
#pragma GCC unroll 4
    for (int s = 0; s < kSegments; ++s) {
      const __m256i low = _mm256_adds_epu8(_mm256_sub_epi8(index, all(static_cast<int16_t>(16 * s))), all(112));
      const __m256i high = _mm256_or_si256(_mm256_slli_epi16(low, 8), all(128));
      same = _mm256_or_si256(
          same, _mm256_or_si256(_mm256_shuffle_epi8(plus[s][0], low), _mm256_shuffle_epi8(plus[s][1], high)));
      other = _mm256_or_si256(
          other, _mm256_or_si256(_mm256_shuffle_epi8(minus[s][0], low), _mm256_shuffle_epi8(minus[s][1], high)));
    }
    return _mm256_blendv_epi8(same, other, differ);
  }
};

/* Any number of steps, in memory. */
struct LookedUp {
  using Lane = int16_t;
  const int16_t* table;
  __m128i shift;
  __m256i end, size;
  explicit LookedUp(const Layer& l)
      : table(l.delta16),
        shift(_mm_cvtsi32_si128(l.delta_shift)),
        end(_mm256_set1_epi16(static_cast<int16_t>(l.delta_size - 1))),
        size(_mm256_set1_epi16(static_cast<int16_t>(l.delta_size))) {}
  LNS_INLINE __m256i operator()(__m256i distance, __m256i differ) const {
    __m256i index = _mm256_min_epu16(_mm256_srl_epi16(distance, shift), end);
    index = _mm256_add_epi16(index, _mm256_and_si256(differ, size));
    const __m256i even = _mm256_and_si256(index, _mm256_set1_epi32(0xffff)), odd = _mm256_srli_epi32(index, 16);
    /* 32 bits from an entry on for the even lanes, and up to it for the odd ones */
    return _mm256_blend_epi16(_mm256_i32gather_epi32((const int*)table, even, 2),
                              _mm256_i32gather_epi32((const int*)(table - 1), odd, 2), 0xaa);
  }
};
#endif

/* kStepped: entry 0 of Δ⁻ stands for several distances, of which 0 alone cancels; else it is below all codes. */
template <class Delta, bool kStepped>
LNS_INLINE void narrow_with(const Tile& t, const Delta& delta_of) {
  using T = typename Delta::Lane;
  using M = Memory<T>;
  using Vector = typename M::Vector;
  constexpr int kLanes = kBytes / sizeof(T);
  constexpr int64_t kRecord = 3 * kLanes;
  constexpr int kBias = sizeof(T) == 1 ? 128 : 32768;
  const Layer& l = *t.layer;
  auto* acc = static_cast<T*>(t.acc);
  const int64_t panels = t.last_panel - t.first_panel;
  const auto* a = static_cast<const int32_t*>(t.a);
  const Vector zero = M::all(static_cast<T>(-kBias)), limit = M::all(static_cast<T>(l.largest - kBias));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = t.group * l.panels + t.first_panel + p;
    const auto* const panel = (const T*)l.weight_lanes.data() + at * (l.depth + 1) * kRecord;
    T start[2][kLanes];
    for (int c = 0; c < kLanes; ++c) {
      const auto i = static_cast<size_t>(at * kLanes + c);
      const int32_t code = l.start_code.empty() ? no_code : l.start_code[i];
      start[0][c] = static_cast<T>((code == no_code ? 0 : code) - kBias);
      start[1][c] = static_cast<T>(l.start_code.empty() ? 0 : l.start_minus[i]);
    }
    for (int64_t r = 0; r < t.rows; r += kChains) {
      Vector code[kChains], sign[kChains];
      const int32_t* row[kChains];
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        code[i] = M::load(start[0]);
        sign[i] = M::load(start[1]);
        row[i] = a + (r + i) * l.depth * 2;
      }
      for (int64_t k = 0; k < l.depth; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          /* see pack_narrow */
          const int64_t kept = row[i][2 * k + 1];
          const T* const record = panel + ((k + 1) * kRecord & (kept >> 1));
          const Vector entry = M::least(M::adds(M::spread(row[i][2 * k]), M::load(record)), limit);
          const Vector entry_sign = M::load(record + kLanes + (kept & 1) * kLanes);
          const Vector big = M::most(code[i], entry), small = M::least(code[i], entry);
          const Vector distance = M::sub(big, small);
          const auto differ = M::negative(M::exclusive(sign[i], entry_sign));
          sign[i] = M::chosen(M::above(entry, code[i]), entry_sign, sign[i]);
          code[i] = M::least(M::adds_where(M::above(small, zero), big, delta_of(distance, differ)), limit);
          if (kStepped) code[i] = M::chosen(M::both(differ, distance), zero, code[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        T* out = acc + ((r + i) * panels + p) * 2 * kLanes;
        M::store(out, M::exclusive(code[i], zero));
        M::store(out + kLanes, sign[i]);
      }
    }
  }
}

template <class Delta>
void narrow(const Tile& t) {
  const Delta delta_of(*t.layer);
  return t.layer->delta_shift ? narrow_with<Delta, true>(t, delta_of) : narrow_with<Delta, false>(t, delta_of);
}

void log8(const Tile& t) {
#if defined(LNS_AVX512)
  return narrow_with<Bytes, false>(t, Bytes(*t.layer));
#else
  switch ((t.layer->delta_used + 15) / 16) {
    case 0:
    case 1:
      return narrow_with<Bytes<1>, false>(t, Bytes<1>(*t.layer));
    case 2:
      return narrow_with<Bytes<2>, false>(t, Bytes<2>(*t.layer));
    case 3:
      return narrow_with<Bytes<3>, false>(t, Bytes<3>(*t.layer));
    default:
      return narrow_with<Bytes<4>, false>(t, Bytes<4>(*t.layer));
  }
#endif
}

void log16(const Tile& t) {
#if defined(LNS_AVX512)
  return t.layer->delta_used <= 32 ? narrow<Words<1>>(t) : narrow<Words<2>>(t);
#else
  switch ((t.layer->delta_used + 15) / 16) {
    case 0:
    case 1:
      return narrow<Words<1>>(t);
    case 2:
      return narrow<Words<2>>(t);
    default:
      return narrow<Words<4>>(t);
  }
#endif
}

void log16_gather(const Tile& t) { return narrow<LookedUp>(t); }

constexpr bool kHasLog8 = true, kHasLog16 = true;
#else
void log8(const Tile&) {}
void log16(const Tile&) {}
void log16_gather(const Tile&) {}
constexpr bool kHasLog8 = false, kHasLog16 = false;
#endif

/* ---- words ------------------------------------------------------------------------------------------------- */

/* What Output::word does with one code, for a vector of them (spec 2.4). */
struct Encoded {
  const vi most, least_word, sign;
  const bool is_signed;
  vi saturated = {}, saturated_negative = {}, flushed = {}; /* counts, as negative numbers */
  explicit Encoded(const Output& o)
      : most(all(static_cast<int32_t>(o.max_code))),
        least_word(all(static_cast<int32_t>(o.least))),
        sign(all(static_cast<int32_t>(o.sign_bit))),
        is_signed(o.sign_bit != 0) {}
  LNS_INLINE vi operator()(vi code, vi minus, vi zero) {
    if (!is_signed) zero |= minus;
    const vi above = (vi)(code > most) & ~zero, below = (vi)(code < 1) & ~zero;
    saturated += above;
    saturated_negative += above & minus;
    flushed += below;
    const vi word = (zero | below) ? least_word : least(code, most);
    return word | ((vi)(word != 0) & minus & ~zero & sign);
  }
  static int64_t sum(vi x) {
    int64_t found = 0;
    for (int i = 0; i < V; ++i) found -= x[i];
    return found;
  }
  void count(lns_counts& counts) const {
    counts.saturated += sum(saturated);
    counts.saturated_negative += sum(saturated_negative);
    counts.flushed += sum(flushed);
  }
};

/* RawCode for a vector of magnitudes below 2^32; anything for zero. */
struct Raw {
  const int32_t *start, *thresholds;
  const int shift, steps;
  const vi origin;
  explicit Raw(const RawCode& r)
      : start(r.start.data()),
        thresholds(r.thresholds32.data()),
        shift(23 - r.bits),
        steps(r.steps),
        origin(all(127 << r.bits)) {}
  LNS_INLINE vi operator()(vi magnitude) const {
    /* a float32 has leading one and following bits in this order; 24 bits convert without rounding */
    const vi cut = (vi)((vu)magnitude >> 24) != 0 ? magnitude & ~0xff : magnitude;
    const vi bits = (vi) __builtin_convertvector(cut, vf) & INT32_MAX;
    const vi slot = most((bits >> shift) - origin, all(0));
    const vi compared = magnitude ^ all(INT32_MIN);
    vi k = gather(start, slot);
    for (int i = 0; i < steps; ++i) k -= (vi)(gather(thresholds, k) <= compared);
    return k;
  }
};

/* The same for magnitudes of any size, by their leading 24 bits as those of a float32, unless these are just below a
 * threshold's: then magnitude(lane) says all. */
struct RawLeading {
  const RawCode& raw;
  const vi origin;
  explicit RawLeading(const Layer& l) : raw(l.raw), origin(all(127 << l.raw.bits)) {}
  template <class Magnitude>
  LNS_INLINE vi operator()(vi bits, vi zero, Magnitude magnitude) const {
    vi code = gather(raw.start.data(), most((bits >> (23 - raw.bits)) - origin, all(0)));
    vi undecided = all(0);
    for (int i = 0; i < raw.steps; ++i) {
      const vi bound = gather(raw.threshold_floats.data(), code);
      undecided |= (vi)(bound - 1 == bits) & ~zero;
      code -= (vi)(bound <= bits);
    }
    if (any(undecided)) {
      for (int i = 0; i < V; ++i) {
        if (undecided[i]) code[i] = static_cast<int32_t>(raw(magnitude(i)));
      }
    }
    return code;
  }
};

/* Sums in two parts, high·2^unit + low, that wrap at unit + 32 bits. */
struct RawWide {
  const RawLeading raw;
  const int unit;
  explicit RawWide(const Layer& l) : raw(l), unit(l.unit) {}
  LNS_INLINE void operator()(vi high, vi low, vi& code, vi& minus, vi& zero) const {
    const vi below = all((1 << unit) - 1);
    /* the parts of the sum: `low` within `below`, then those of the magnitude */
    high = add(high, low >> unit);
    low &= below;
    zero = (vi)((high | low) == 0);
    minus = high >> 31;
    const vi carries = minus & (vi)(low != 0);
    high = (vi)(((vu)high ^ (vu)minus) - ((vu)minus - (vu)carries));
    low = ((low ^ minus) - minus) & below;
    const vi large = (vi)((vu)high >> 24) != 0;
    const vi leading = large ? high : (vi)((vu)high << unit) | low;
    const vi cut = (vi)((vu)leading >> 24) != 0 ? leading & ~0xff : leading;
    const vi bits = ((vi) __builtin_convertvector(cut, vf) & INT32_MAX) + (large & (unit << 23));
    code = raw(bits, zero, [&](int i) {
      return static_cast<uint64_t>(static_cast<uint32_t>(high[i])) << unit | static_cast<uint32_t>(low[i]);
    });
  }
};

/* vector(row, column) gives code, sign and zero of V columns; its columns are whole panels, so none is missing. */
template <class Make>
LNS_INLINE void words_of(const Layer& l, int64_t rows, int64_t columns, int64_t channel, int32_t* words,
                         lns_counts& counts, Make make) {
  Encoded encoded(l.output);
  vi lane;
  for (int i = 0; i < V; ++i) lane[i] = i;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += V) {
      const vi shift = *(const vi_anywhere*)(l.code_shift32.data() + channel + c);
      vi code, minus, zero;
      make(r, c, code, minus, zero);
      zero |= (vi)(lane >= all(static_cast<int32_t>(columns - c)));
      *(vi*)(words + r * row_words + c) = encoded(code + shift, minus, zero);
    }
  }
  encoded.count(counts);
}

template <class T>
LNS_INLINE vi widened(const T* from) {
  vi x;
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) x[i] = from[i];
  return x;
}

/* A sum's bins, each times its constant: an integer below 2^53 (see pack_bins), so in doubles, which multiply side by
 * side. */
template <int E>
LNS_INLINE double combined(const Layer& l, const int32_t* bins) {
  /* wrapped bins are fitted to their width here */
  const int unused = l.saturate ? 0 : 32 - l.acc_bits;
  using Lane = Lanes<E>;
  const auto fitted = (typename Lane::Vector)((*(const typename Lane::Unsigned*)bins) << unused) >> unused;
  const auto products =
      __builtin_convertvector(fitted, typename Lane::Doubles) * *(const typename Lane::Doubles*)l.bin_constants;
  double parts[E];
#pragma GCC unroll 16
  for (int b = 0; b < E; ++b) parts[b] = products[b];
#pragma GCC unroll 4
  for (int half = E / 2; half; half /= 2) {
#pragma GCC unroll 8
    for (int b = 0; b < half; ++b) parts[b] += parts[b + half];
  }
  return parts[0];
}

void words(const Tile& t, int64_t row, int64_t rows, int64_t column, int64_t columns, int32_t* words,
           lns_counts& counts) {
  const Layer& l = *t.layer;
  const int64_t panels = t.last_panel - t.first_panel, width = t.panel, row_size = panels * width;
  const int64_t channel = t.group * l.columns + t.first_panel * width + column;
  const auto sums_of = [&](const int32_t* from, auto split) __attribute__((always_inline)) {
    words_of(l, rows, columns, channel, words, counts,
             [&](int64_t r, int64_t c, vi& code, vi& minus, vi& zero)
                 __attribute__((always_inline)) { split(from + r * row_size + c, code, minus, zero); });
  };
  const auto logs_of = [&](auto* acc) __attribute__((always_inline)) {
    const int guard = l.guard_bits;
    const vi half = all((1 << guard) >> 1);
    words_of(l, rows, columns, channel, words, counts,
             [&](int64_t r, int64_t c, vi& code, vi& minus, vi& zero) __attribute__((always_inline)) {
               const int64_t at = column + c;
               const auto* from = acc + ((row + r) * panels + at / width) * 2 * width + at % width;
               const vi sum = widened(from);
               zero = (vi)(sum < 1);
               minus = (vi)(widened(from + width) != 0) & ~zero;
               code = (sum + half) >> guard;
             });
  };
  if (t.low) {
    const auto* const high = static_cast<const int32_t*>(t.acc) + row * row_size + column;
    const int32_t* const low = t.low + row * row_size + column;
    const RawWide raw(l);
    words_of(l, rows, columns, channel, words, counts,
             [&](int64_t r, int64_t c, vi& code, vi& minus, vi& zero) __attribute__((always_inline)) {
               raw(*(const vi*)(high + r * row_size + c), *(const vi*)(low + r * row_size + c), code, minus, zero);
             });
    return;
  }
  switch (l.kind) {
    case Kind::fp32:
    case Kind::mitchell:
    case Kind::gather: {
      const Raw raw(l.raw);
      const int unused = l.saturate ? 0 : 32 - l.acc_bits;
      sums_of(static_cast<const int32_t*>(t.acc) + row * row_size + column,
              [&](const int32_t* from, vi& code, vi& minus, vi& zero) __attribute__((always_inline)) {
                const vi sum = (vi)((vu)(*(const vi*)from) << unused) >> unused;
                minus = sum >> 31;
                zero = (vi)(sum == 0);
                code = raw((vi)((vu)(sum ^ minus) - (vu)minus));
              });
      return;
    }
    case Kind::bins: {
      const auto* acc = static_cast<const int32_t*>(t.acc);
      const RawLeading raw(l);
      words_of(l, rows, columns, channel, words, counts,
               [&](int64_t r, int64_t c, vi& code, vi& minus, vi& zero) __attribute__((always_inline)) {
                 double sums[V] = {};
                 alignas(64) int32_t leading[V], signs[V];
                 for (int i = 0; i < V; ++i) {
                   /* vectors may be wider than what is left of a panel of bins */
                   if (c + i < columns) {
                     const int32_t* bins = acc + ((row + r) * row_size + column + c + i) * l.bin_stride;
                     sums[i] = l.bin_stride == 4   ? combined<4>(l, bins)
                               : l.bin_stride == 8 ? combined<8>(l, bins)
                                                   : combined<16>(l, bins);
                   }
                   /* a float64 of an integer, as a float32: other bias, and bits that are left out */
                   int64_t bits;
                   std::memcpy(&bits, &sums[i], 8);
                   signs[i] = sums[i] < 0 ? -1 : 0;
                   leading[i] = sums[i] == 0
                                    ? -1
                                    : static_cast<int32_t>(((bits & INT64_MAX) >> 29) - (int64_t{1023 - 127} << 23));
                 }
                 const vi bits = *(const vi*)leading;
                 minus = *(const vi*)signs;
                 zero = (vi)(bits < 0);
                 code = raw(bits, zero, [&](int i) { return static_cast<uint64_t>(std::fabs(sums[i])); });
               });
      return;
    }
    case Kind::log8:
      return logs_of(static_cast<const int8_t*>(t.acc));
    case Kind::log16:
      return logs_of(static_cast<const int16_t*>(t.acc));
    default:
      return logs_of(static_cast<const int32_t*>(t.acc));
  }
}

#if defined(LNS_AVX512)
constexpr int kFast = 8, kSlow = 4;
#else
constexpr int kFast = 4, kSlow = 2;
#endif

/* ---- floats of words, for training ------------------------------------------------------------------------- */

/* body(from, to, valid) over vectors; the last is copied, so that nothing is read beyond the end */
template <class Body>
LNS_INLINE void vectors(int64_t count, const int32_t* x, int32_t* y, Body body) {
  int64_t i = 0;
  for (; i + V <= count; i += V) *(vi_anywhere*)(y + i) = body(*(const vi_anywhere*)(x + i));
  if (i == count) return;
  vi rest = {};
  std::memcpy(&rest, x + i, static_cast<size_t>(count - i) * 4);
  rest = body(rest);
  std::memcpy(y + i, &rest, static_cast<size_t>(count - i) * 4);
}

LNS_INLINE int32_t top_of(vi x) {
  int32_t found = x[0];
  for (int i = 1; i < V; ++i) found = std::max(found, x[i]);
  return found;
}

int32_t round_floats(const Rounding& r, int32_t low, int32_t high, int64_t count, const int32_t* x, int32_t* y) {
  const int32_t* bounds = r.bounds;
  const int32_t* values = r.values;
  const vi lowest = all(low), highest = all(high), first = all(r.first);
  const auto rounded = [&](vi bits) __attribute__((always_inline)) {
    const vi bucket = (bits >> r.drop) - first;
    /* comparisons give -1 */
    return gather(values, bucket - (vi)(bits > gather(bounds, bucket)));
  };
  const vi smallest = rounded(lowest);
  vi seen = all(0);
  vectors(count, x, y, [&](vi raw) __attribute__((always_inline)) {
    const vi bits = raw & all(INT32_MAX), minus = raw >> 31;
    seen = most(seen, bits);
    const vi value = rounded(least(most(bits, lowest), highest));
    if (!r.least) {
      const vi signed_value = r.is_signed ? value | (raw & all(INT32_MIN)) : value & ~minus;
      return signed_value & (vi)(bits >= lowest);
    }
    /* -0 is no negative number */
    const vi negative = minus & (vi)(bits > 0);
    return r.is_signed ? value | (negative & all(INT32_MIN)) : (value & ~negative) | (smallest & negative);
  });
  return top_of(seen);
}

int32_t largest_bits(const int32_t* x, int64_t count) {
  vi seen[4] = {};
  int64_t i = 0;
  for (; i + 4 * V <= count; i += 4 * V) {
    for (int j = 0; j < 4; ++j) seen[j] = most(seen[j], *(const vi_anywhere*)(x + i + j * V) & all(INT32_MAX));
  }
  int32_t found = top_of(most(most(seen[0], seen[1]), most(seen[2], seen[3])));
  for (; i < count; ++i) found = std::max(found, x[i] & INT32_MAX);
  return found;
}

/* ---- steps of optimizers ----------------------------------------------------------------------------------- */

/* Every operation rounds as torch's own does, and in the same order: results are the same to the bit. */

LNS_INLINE vf allf(float x) {
  vf y;
  for (int i = 0; i < V; ++i) y[i] = x;
  return y;
}
LNS_INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
LNS_INLINE vf limited(vf x, vf low, vf high) {
  x = pick((vi)(x > low), x, low); /* and NaN is low */
  return pick((vi)(x < high), x, high);
}
/* -1, 0 or 1 */
LNS_INLINE vf sign_of(vf x) { return __builtin_convertvector((vi)(x < vf{}) - (vi)(x > vf{}), vf); }
LNS_INLINE vf gather_floats(const float* table, vi index) { return (vf)gather((const int32_t*)table, index); }

/* 1/√x, both operations rounded to nearest */
LNS_INLINE vf reciprocal_root(vf x) {
#if defined(LNS_AVX512) && !defined(LNS_EMULATE_AVX512)
  return allf(1.0f) / (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(LNS_AVX2)
  return allf(1.0f) / (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < V; ++i) x[i] = std::sqrt(x[i]);
  return allf(1.0f) / x;
#endif
}

/* What an array has from i on: a vector of int32 numbers made of n elements, n = V but at the end. */
template <class Vector, class T>
LNS_INLINE Vector some(const T* x, int64_t i, int64_t n) {
  typedef T Narrow __attribute__((vector_size(V * sizeof(T))));
  Narrow narrow = {};
  if (n == V) {
    std::memcpy(&narrow, x + i, sizeof narrow);
  } else {
    std::memcpy(&narrow, x + i, static_cast<size_t>(n) * sizeof(T));
  }
  return __builtin_convertvector(narrow, Vector);
}
template <class T, class Vector>
LNS_INLINE void put(Vector v, T* x, int64_t i, int64_t n) {
  typedef T Narrow __attribute__((vector_size(V * sizeof(T))));
  const Narrow narrow = __builtin_convertvector(v, Narrow);
  if (n == V) {
    std::memcpy(x + i, &narrow, sizeof narrow);
  } else {
    std::memcpy(x + i, &narrow, static_cast<size_t>(n) * sizeof(T));
  }
}
#if defined(LNS_AVX2)
/* The compiler takes these apart into single elements. */
template <>
LNS_INLINE vi some<vi, int16_t>(const int16_t* x, int64_t i, int64_t n) {
  __m128i narrow = _mm_setzero_si128();
  if (n == V) {
    narrow = _mm_loadu_si128((const __m128i*)(x + i));
  } else {
    std::memcpy(&narrow, x + i, static_cast<size_t>(n) * 2);
  }
  return (vi)_mm256_cvtepi16_epi32(narrow);
}
template <>
LNS_INLINE vi some<vi, uint8_t>(const uint8_t* x, int64_t i, int64_t n) {
  __m128i narrow = _mm_setzero_si128();
  if (n == V) {
    narrow = _mm_loadl_epi64((const __m128i*)(x + i));
  } else {
    std::memcpy(&narrow, x + i, static_cast<size_t>(n));
  }
  return (vi)_mm256_cvtepu8_epi32(narrow);
}
template <>
LNS_INLINE void put<int16_t, vi>(vi v, int16_t* x, int64_t i, int64_t n) {
  const __m256i both = _mm256_packs_epi32((__m256i)v, (__m256i)v);
  const __m128i narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
  if (n == V) {
    _mm_storeu_si128((__m128i*)(x + i), narrow);
  } else {
    std::memcpy(x + i, &narrow, static_cast<size_t>(n) * 2);
  }
}
#endif
template <class Body>
LNS_INLINE void pieces(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + V <= count; i += V) body(i, int64_t{V});
  if (i < count) body(i, count - i);
}

/* ĝ·sign w, scaled and bounded */
LNS_INLINE vf shrinkage(const MadamStep& s, vf sign, vf g, vf v) {
  const vf least = allf(s.least);
  const vf root = reciprocal_root(pick((vi)(v > least), v, least));
  return limited(root * g * allf(s.rate) * sign, allf(-s.bound), allf(s.bound));
}
/* Zeros wake against their gradient; magnitudes below the least change sign if they may. */
LNS_INLINE vf turned(const MadamStep& s, vf sign, vi below, vf g) {
  vf against = sign_of(g);
  if (!s.ascend) against = -against;
  if (s.flip) sign = pick(below, -sign, sign);
  return pick((vi)(sign == vf{}), against, sign);
}

void octaves(const MadamStep& s, int64_t count, const float* w, const float* g, const float* v, float* x) {
  pieces(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    put(shrinkage(s, sign_of(some<vf>(w, i, n)), some<vf>(g, i, n), some<vf>(v, i, n)), x, i, n);
  });
}

template <bool spread>
LNS_INLINE int64_t move_by(const MadamStep& s, int64_t count, const float* w, const float* g, const float* x,
                           const float* low, const float* high, float* y) {
  int64_t clipped = 0;
  const vf one_low = allf(*low), one_high = allf(*high);
  pieces(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf bottom = spread ? some<vf>(low, i, n) : one_low, top = spread ? some<vf>(high, i, n) : one_high;
    const vf weight = some<vf>(w, i, n);
    vf sign = sign_of(weight);
    vf size = weight * sign * some<vf>(x, i, n);
    sign = turned(s, sign, (vi)(size < bottom), some<vf>(g, i, n));
    size = limited(size, bottom, top);
    const vi at_top = (vi)(size >= top);
    if (any(at_top)) {
      for (int j = 0; j < n; ++j) clipped -= at_top[j];
    }
    put(size * sign, y, i, n);
  });
  return clipped;
}

int64_t move(const MadamStep& s, int64_t count, const float* w, const float* g, const float* x, const float* low,
             const float* high, bool spread, float* y) {
  if (count == 0) return 0;
  return spread ? move_by<true>(s, count, w, g, x, low, high, y) : move_by<false>(s, count, w, g, x, low, high, y);
}

/* The integer nearest to x, ties to even, for |x| < 2^23. */
LNS_INLINE vi nearest(vf x) {
  const vf size = (vf)((vi)x & all(INT32_MAX)), large = allf(8388608.0f);
  const vi whole = __builtin_convertvector((size + large) - large, vi), minus = (vi)x >> 31;
  return (whole ^ minus) - minus;
}

template <bool spread>
LNS_INLINE int64_t step_by(const CodeStep& c, int64_t count, int16_t* codes, const float* g, const float* v,
                           const uint8_t* random, const int64_t* bases, float* y) {
  int64_t clipped = 0;
  const vi one_base = all(static_cast<int32_t>(*bases)), top = all(c.max_code);
  const vi half = all(c.drop ? 1 << (c.drop - 1) : 0), last = all(c.table_last);
  pieces(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vi code = some<vi>(codes, i, n);
    const vi minus = code >> 31;
    vf sign = __builtin_convertvector(minus - (vi)(code > 0), vf);
    const vf grad = some<vf>(g, i, n);
    vi step = nearest(shrinkage(c.step, sign, grad, some<vf>(v, i, n)));
    if (random) step = (step + some<vi>(random, i, n)) >> 8;
    vi size = ((code ^ minus) - minus) - step;
    sign = turned(c.step, sign, (vi)(size < 1), grad);
    size = least(most(size, all(1)), top);
    const vi at_top = (vi)(size == top);
    if (any(at_top)) {
      for (int j = 0; j < n; ++j) clipped -= at_top[j];
    }
    put(size * __builtin_convertvector(sign, vi), codes, i, n);
    size = least(most((size + half) >> c.drop, all(1)), all(c.compute_max)) << c.drop;
    const vi base = spread ? some<vi>(bases, i, n) : one_base;
    put(gather_floats(c.table, least(most(size + base, all(0)), last)) * sign, y, i, n);
  });
  return clipped;
}

int64_t step_codes(const CodeStep& c, int64_t count, int16_t* codes, const float* g, const float* v,
                   const uint8_t* random, const int64_t* bases, bool spread, float* y) {
  if (count == 0) return 0;
  return spread ? step_by<true>(c, count, codes, g, v, random, bases, y)
                : step_by<false>(c, count, codes, g, v, random, bases, y);
}

}  // namespace

const Isa& LNS_JOIN(isa_, LNS_ISA_NAME)() {
  static const Isa isa = {
      LNS_ISA_ID,
      LNS_STRING(LNS_ISA_NAME),
      words,
      round_floats,
      largest_bits,
      octaves,
      move,
      step_codes,
      {kShiftedColumns, 1, shifted},
      {kPanel, 1, expanded<kWrap>},
      {kPanel, 1, expanded<kSaturate>},
      {kPanel, kFast, linear<Fp32, kWrap, kFast>},
      {kPanel, kFast, linear<Fp32, kSaturate, kFast>},
      {kPanel, kSlow, linear<Fp32, kLanes, kSlow>},
      {kPanel, 2, fp32_wide},
      {kPanel / 2, kFast, linear<Fp64, kWrap, kFast>},
      {kPanel / 2, kFast, linear<Fp64, kSaturate, kFast>},
      {kPanel / 2, kSlow, linear<Fp64, kLanes, kSlow>},
      {kPanel, kFast, linear<Mitchell, kWrap, kFast>},
      {kPanel, kFast, linear<Mitchell, kSaturate, kFast>},
      {kPanel, kSlow, linear<Mitchell, kLanes, kSlow>},
      {kPanel, 2, linear<Gather, kWrap, 2>},
      {kPanel, 2, linear<Gather, kSaturate, 2>},
      {kPanel, 2, linear<Gather, kLanes, 2>},
      {bins_panel, 1, bins},
      {kBytes, kChains, log8},
      {kBytes / 2, kChains, log16},
      {kBytes / 2, kChains, log16_gather},
      {V, kChains, log32},
      kHasLog8,
      kHasLog16,
      kShiftedRows,
  };
  return isa;
}

}  // namespace lns
