/* The inner loops, compiled once for each instruction set. Vectors are the compiler's own (vector_size), so that one
 * text serves all; intrinsics appear where a table is looked up. Nothing here depends on the order of threads, and
 * every kernel gives the bits of the general one. */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int V = kBytes / 4;

typedef int32_t vi __attribute__((vector_size(kBytes), may_alias));
typedef uint32_t vu __attribute__((vector_size(kBytes), may_alias));
typedef float vf __attribute__((vector_size(kBytes), may_alias));
typedef double vd __attribute__((vector_size(kBytes), may_alias));

/* the same anywhere in memory */
typedef int32_t vi_anywhere __attribute__((vector_size(kBytes), may_alias, aligned(4)));

#define LNS_INLINE inline __attribute__((always_inline))

LNS_INLINE vi all(int32_t x) { return x - vi{}; }
LNS_INLINE vi add(vi a, vi b) { return (vi)((vu)a + (vu)b); }
LNS_INLINE vi least(vi a, vi b) { return a < b ? a : b; }
LNS_INLINE vi most(vi a, vi b) { return a > b ? a : b; }
LNS_INLINE vi clamp(vi x, vi limit) { return most(least(x, limit), -limit); }

LNS_INLINE vi gather(const int32_t* table, vi index) {
#if defined(__AVX512F__)
  return (vi)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (vi)_mm256_i32gather_epi32(table, (__m256i)index, 4);
#else
  vi found;
  for (int i = 0; i < V; ++i) found[i] = table[index[i]];
  return found;
#endif
}

/* ---- linear accumulation: products made in registers ------------------------------------------------------ */

/* Float32 numbers 2^(code/γ) multiplied, the significand rounded to the remainder table's bits, the fraction dropped
 * (spec 4.1 to 4.3). lns_dot_create has checked that this gives every term of the table. */
struct Fp32 {
  using Scalar = float;
  using Vector = vf;
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
  explicit Mitchell(const Layer&) {}
  static const int32_t* weights(const Layer& l) { return l.weight_ints.data(); }
  LNS_INLINE vi term(vi w, int32_t a) const { return __builtin_convertvector((vf)add(w, all(a)), vi); }
};

/* Columns of a panel: two vectors. */
constexpr int kPanel = 2 * V;
/* Depth of a block: panel and rows stay in the first-level cache. */
constexpr int64_t kDepth = 256;

enum Mode { kWrap, kSaturate, kLanes };

template <class Product, int mode, int kRows>
LNS_INLINE void linear_block(const Product& product, const Layer& l, const typename Product::Scalar* a,
                             const typename Product::Scalar* w, int64_t depth, int32_t* out, int64_t stride) {
  using Vector = typename Product::Vector;
  vi acc[kRows][2];
  const vi limit = all(l.limit), step_limit = all(l.step_limit);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = *(const vi*)(out + r * stride);
    acc[r][1] = *(const vi*)(out + r * stride + V);
  }
  const int64_t row = l.depth;
  if (mode == kLanes) {
    for (int64_t first = 0; first < depth; first += l.lanes) {
      const int64_t last = first + l.lanes < depth ? first + l.lanes : depth;
      vi step[kRows][2] = {};
      for (int64_t k = first; k < last; ++k) {
        const Vector w0 = *(const Vector*)(w + k * kPanel), w1 = *(const Vector*)(w + k * kPanel + V);
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
      const Vector w0 = *(const Vector*)(w + k * kPanel), w1 = *(const Vector*)(w + k * kPanel + V);
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
    *(vi*)(out + r * stride) = acc[r][0];
    *(vi*)(out + r * stride + V) = acc[r][1];
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

template <class Product, int mode, int kRows>
void linear(const Tile& t) {
  const Layer& l = *t.layer;
  const Product product(l);
  auto* acc = static_cast<int32_t*>(t.acc);
  begin(t, acc, l.start32, kPanel, l.panels);
  const int64_t columns = (t.last_panel - t.first_panel) * kPanel;
  const auto* a = static_cast<const typename Product::Scalar*>(t.a);
  const auto* w = Product::weights(l) + (t.group * l.panels + t.first_panel) * l.depth * kPanel;
  /* a step of lanes is never cut */
  const int64_t block = mode == kLanes ? (kDepth + l.lanes - 1) / l.lanes * l.lanes : kDepth;
  for (int64_t first = 0; first < l.depth; first += block) {
    const int64_t depth = l.depth - first < block ? l.depth - first : block;
    for (int64_t p = 0; p < t.last_panel - t.first_panel; ++p) {
      const auto* panel = w + (p * l.depth + first) * kPanel;
      for (int64_t r = 0; r < t.rows; r += kRows) {
        linear_block<Product, mode, kRows>(product, l, a + r * l.depth + first, panel, depth,
                                           acc + r * columns + p * kPanel, columns);
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
  alignas(64) static thread_local int32_t storage[kStep * kRow];
  int32_t* const rows = storage;
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
 * laid out, γ rows for each sign, and a product is a load and a shift. Negative ones are one's complements, whose
 * arithmetic shift is that of the magnitude but for −1: how many there were is counted by bits, and added at the end.
 */
LNS_INLINE void expand_octave(const Tile& t, const int16_t* codes, int32_t* rows) {
  constexpr int kColumns = 4 * V;
  const Layer& l = *t.layer;
  const int gamma = static_cast<int>(l.gamma);
  const int32_t highest = static_cast<int32_t>(max_code(l.activation) * l.activation_widen - l.gamma + 1);
  for (int j = 0; j < 4; ++j) {
    vi index, sign, used;
    for (int c = 0; c < V; ++c) {
      const int code = codes[j * V + c];
      index[c] = code ? highest + (code < 0 ? -code : code) : static_cast<int32_t>(l.zero_stream);
      sign[c] = code < 0 ? -1 : 0;
      used[c] = code ? -1 : 0;
    }
    *(vi*)(rows + j * V) = all(0);
    for (int r = 0; r < gamma; ++r) {
      const vi term = gather(l.term_stream.data(), index + r) ^ sign;
      *(vi*)(rows + (1 + r) * kColumns + j * V) = term;
      *(vi*)(rows + (1 + gamma + r) * kColumns + j * V) = ~term & used;
    }
  }
}

void shifted(const Tile& t) {
  constexpr int64_t kStep = shifted_depth;
  constexpr int kColumns = 4 * V;
  constexpr int64_t kRow = (1 + 2 * shifted_gamma) * kColumns;
  const Layer& l = *t.layer;
  auto* acc = static_cast<int32_t*>(t.acc);
  begin(t, acc, l.expanded_start, kColumns, l.expanded_panels);
  alignas(64) static thread_local int32_t storage[kStep * kRow];
  int32_t* const rows = storage;
  const auto* a = static_cast<const uint32_t*>(t.a);
  const int64_t panel = t.group * l.expanded_panels + t.first_panel;
  const int16_t* codes = l.weight_codes.data() + panel * l.depth * kColumns;
  for (int64_t first = 0; first < l.depth; first += kStep) {
    const int64_t depth = l.depth - first < kStep ? l.depth - first : kStep;
    for (int64_t k = 0; k < depth; ++k) expand_octave(t, codes + (first + k) * kColumns, rows + k * kRow);
    for (int64_t k = depth; k < kStep; ++k) std::memset(rows + k * kRow, 0, kColumns * sizeof(int32_t));
    const uint32_t* block = a + first * t.rows;
    for (int64_t r = 0; r < t.rows; ++r) {
      int32_t* out = acc + r * kColumns;
      vi sum[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] = *(vi*)(out + j * V);
#pragma GCC unroll 8
      for (int64_t k = 0; k < kStep; ++k) {
        const uint32_t packed = block[r * kStep + k];
        const auto* term = (const vi*)((const char*)(rows + k * kRow) + (packed & 0xffff));
        const int shift = static_cast<int>(packed >> 16);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], term[j] >> shift);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) *(vi*)(out + j * V) = sum[j];
    }
  }
  const int64_t words = (l.depth + 63) / 64;
  const uint64_t* planes = l.weight_planes.data() + panel * words * 2 * kColumns;
  for (int64_t r = 0; r < t.rows; ++r) {
    const uint64_t* row = t.planes + r * words * 2;
    uint32_t negative[kColumns] = {};
    for (int64_t i = 0; i < words; ++i) {
      const uint64_t plus = row[2 * i], minus = row[2 * i + 1];
      const uint64_t* w = planes + i * 2 * kColumns;
      for (int c = 0; c < kColumns; ++c) {
        negative[c] += static_cast<uint32_t>(__builtin_popcountll((plus & w[kColumns + c]) | (minus & w[c])));
      }
    }
    for (int c = 0; c < kColumns; ++c) {
      acc[r * kColumns + c] = static_cast<int32_t>(static_cast<uint32_t>(acc[r * kColumns + c]) + negative[c]);
    }
  }
}

/* Whether any lane is not zero. */
LNS_INLINE bool any(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  int32_t found = 0;
  for (int i = 0; i < V; ++i) found |= x[i];
  return found != 0;
#endif
}

/* The same with bins: a row holds 16 · term + bin, one vector of columns a panel. */
LNS_INLINE void expand_bins(const Tile& t, const int16_t* codes, int32_t* rows) {
  const Layer& l = *t.layer;
  const int32_t* stream[V];
  vi sign;
  for (int c = 0; c < V; ++c) {
    const int code = codes[c];
    stream[c] = l.term_stream.data() + (code ? (code < 0 ? -code : code) : l.zero_stream);
    sign[c] = code < 0 ? -1 : 0;
  }
  for (int64_t c = t.least_code / V * V; c <= t.largest_code; c += V) {
    vi m[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) m[i] = *(const vi_anywhere*)(stream[i] + c);
    transpose(m);
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      const vi bin = m[i] & 15, term = ((m[i] - bin) ^ sign) - sign;
      *(vi*)(rows + (c + i) * V) = term | bin;
      *(vi*)(rows + (expanded_codes + c + i) * V) = -term | bin;
    }
  }
  *(vi*)rows = all(0);
}

template <int kBins>
void expanded_bins_of(const Tile& t) {
  constexpr int64_t kStep = expanded_bins_depth;
  constexpr int64_t kRow = 2 * expanded_codes * V;
  const Layer& l = *t.layer;
  auto* acc = static_cast<int32_t*>(t.acc);
  alignas(64) static thread_local int32_t storage[kStep * kRow];
  int32_t* const rows = storage;
  const auto* a = static_cast<const uint16_t*>(t.a);
  const int64_t panel = t.group * l.expanded_panels + t.first_panel;
  const int16_t* codes = l.weight_codes.data() + panel * l.depth * V;
  std::memset(acc, 0, static_cast<size_t>(t.rows) * kBins * V * sizeof(int32_t));
  if (!l.expanded_start.empty()) {
    for (int64_t r = 0; r < t.rows; ++r) {
      std::memcpy(acc + r * kBins * V, l.expanded_start.data() + panel * V, V * sizeof(int32_t));
    }
  }
  const vi limit = all(l.limit);
  /* by activation code: the largest term of any column */
  const int32_t* heaviest[kStep];
  for (int64_t first = 0; first < l.depth; first += kStep) {
    const int64_t depth = l.depth - first < kStep ? l.depth - first : kStep;
    for (int64_t k = 0; k < kStep; ++k) {
      heaviest[k] = l.term_stream.data() + l.zero_stream;
      if (k >= depth) {
        std::memset(rows + k * kRow, 0, V * sizeof(int32_t));
        continue;
      }
      const int16_t* column = codes + (first + k) * V;
      expand_bins(t, column, rows + k * kRow);
      int code = 0;
      for (int c = 0; c < V; ++c) code = std::max(code, std::abs(int{column[c]}));
      if (code) heaviest[k] = l.term_stream.data() + code;
    }
    const uint16_t* block = a + first * t.rows;
    for (int64_t r = 0; r < t.rows; ++r) {
      int32_t* out = acc + r * kBins * V;
      vi sum[kBins];
#pragma GCC unroll 16
      for (int b = 0; b < kBins; ++b) sum[b] = *(vi*)(out + b * V);
      const auto add_terms = [&](bool clamps) __attribute__((always_inline)) {
        for (int64_t k = 0; k < kStep; ++k) {
          const vi found = *(const vi*)((const char*)(rows + k * kRow) + block[r * kStep + k]);
          const vi bin = found & 15, term = found >> 4;
#pragma GCC unroll 16
          for (int b = 0; b < kBins; ++b) {
            sum[b] = add(sum[b], (vi)(bin == b) & term);
            if (clamps) sum[b] = clamp(sum[b], limit);
          }
        }
      };
      /* where no sum of this block can leave the range, clamping changes nothing */
      vi largest = all(0);
      int64_t safe = l.limit;
      if (l.saturate) {
        for (int64_t k = 0; k < kStep; ++k) {
          const int64_t code = block[r * kStep + k] / (V * sizeof(int32_t)) % expanded_codes;
          safe -= l.term_peaks[heaviest[k] - l.term_stream.data() + code];
        }
#pragma GCC unroll 16
        for (int b = 0; b < kBins; ++b) largest = most(largest, most(sum[b], -sum[b]));
      }
      if (l.saturate && (safe < 0 || any((vi)(largest > all(static_cast<int32_t>(safe)))))) {
        add_terms(true);
      } else {
        add_terms(false);
      }
#pragma GCC unroll 16
      for (int b = 0; b < kBins; ++b) *(vi*)(out + b * V) = sum[b];
    }
  }
}

void expanded_bins(const Tile& t) {
  switch (t.layer->bins) {
    case 2:
      return expanded_bins_of<2>(t);
    case 4:
      return expanded_bins_of<4>(t);
    case 8:
      return expanded_bins_of<8>(t);
    default:
      return expanded_bins_of<16>(t);
  }
}

/* Terms too large for 32 bits, summed in float64 as integers below 2^53. */
LNS_INLINE vf truncated(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
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

/* ---- linear accumulation: terms looked up ----------------------------------------------------------------- */

/* Packed codes: the sign in the top bit, and numbers whose sum indexes the table, so that a pair with a zero finds
 * a zero (see pack_codes). */
void gather_terms(const Tile& t) {
  constexpr int kRows = 2;
  const Layer& l = *t.layer;
  auto* acc = static_cast<int32_t*>(t.acc);
  begin(t, acc, l.start32, kPanel, l.panels);
  const int64_t columns = (t.last_panel - t.first_panel) * kPanel;
  const auto* a = static_cast<const int32_t*>(t.a);
  const int32_t* w = l.weight_ints.data() + (t.group * l.panels + t.first_panel) * l.depth * kPanel;
  const int32_t* table = l.table.data();
  const vi limit = all(l.limit), step_limit = all(l.step_limit), index_mask = all(INT32_MAX);
  const int64_t lanes = l.saturate ? l.lanes : l.depth;
  for (int64_t p = 0; p < t.last_panel - t.first_panel; ++p) {
    const int32_t* panel = w + p * l.depth * kPanel;
    for (int64_t r = 0; r < t.rows; r += kRows) {
      vi sum[kRows][2];
      int32_t* out = acc + r * columns + p * kPanel;
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < 2; ++j) sum[i][j] = *(const vi*)(out + i * columns + j * V);
      }
      for (int64_t first = 0; first < l.depth; first += lanes) {
        const int64_t last = first + lanes < l.depth ? first + lanes : l.depth;
        vi step[kRows][2] = {};
        for (int64_t k = first; k < last; ++k) {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const vi x = all(a[(r + i) * l.depth + k]);
#pragma GCC unroll 8
            for (int j = 0; j < 2; ++j) {
              const vi both = add(x, *(const vi*)(panel + k * kPanel + j * V));
              const vi sign = both >> 31;
              const vi term = gather(table, both & index_mask);
              step[i][j] = add(step[i][j], (term ^ sign) - sign);
            }
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < 2; ++j) {
            sum[i][j] =
                l.saturate ? clamp(add(sum[i][j], clamp(step[i][j], step_limit)), limit) : add(sum[i][j], step[i][j]);
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < 2; ++j) *(vi*)(out + i * columns + j * V) = sum[i][j];
      }
    }
  }
}

/* Terms with their bin in the low four bits; one vector of columns a panel, its bins in registers. */
template <int kBins>
void bins_of(const Tile& t) {
  const Layer& l = *t.layer;
  auto* acc = static_cast<int32_t*>(t.acc);
  const int64_t panels = t.last_panel - t.first_panel;
  const auto* a = static_cast<const int32_t*>(t.a);
  const int32_t* w = l.weight_ints.data() + (t.group * l.panels + t.first_panel) * l.depth * V;
  const int32_t* table = l.table.data();
  const vi limit = all(l.limit), index_mask = all(INT32_MAX), bin_mask = all(15);
  for (int64_t p = 0; p < panels; ++p) {
    const int32_t* panel = w + p * l.depth * V;
    for (int64_t r = 0; r < t.rows; ++r) {
      vi sum[kBins] = {};
      if (!l.start32.empty())
        sum[0] = *(const vi_anywhere*)(l.start32.data() + (t.group * l.panels + t.first_panel + p) * V);
      const int32_t* row = a + r * l.depth;
      for (int64_t k = 0; k < l.depth; ++k) {
        const vi both = add(all(row[k]), *(const vi*)(panel + k * V));
        const vi sign = both >> 31;
        const vi found = gather(table, both & index_mask);
        const vi term = ((found >> 4) ^ sign) - sign;
        const vi bin = found & bin_mask;
#pragma GCC unroll 16
        for (int b = 0; b < kBins; ++b) sum[b] = add(sum[b], (vi)(bin == b) & term);
        if (l.saturate) {
#pragma GCC unroll 16
          for (int b = 0; b < kBins; ++b) sum[b] = clamp(sum[b], limit);
        }
      }
      int32_t* out = acc + (r * panels + p) * kBins * V;
      for (int b = 0; b < kBins; ++b) *(vi*)(out + b * V) = sum[b];
    }
  }
}

void bins(const Tile& t) {
  switch (t.layer->bins) {
    case 1:
      return bins_of<1>(t);
    case 2:
      return bins_of<2>(t);
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

/* Bytes: codes up to 127, Δ in registers. A zero is −128, so that its distance to any code has the top bit set, for
 * which no table has an entry. */
#if defined(__AVX512VBMI__) || defined(__AVX2__)

#if defined(__AVX512VBMI__)
using Mask = __mmask64;
struct Bytes {
  using Vector = __m512i;
  static LNS_INLINE Vector all(int8_t x) { return _mm512_set1_epi8(x); }
  static LNS_INLINE Vector load(const int8_t* x) { return _mm512_loadu_si512(x); }
  static LNS_INLINE void store(int8_t* to, Vector x) { _mm512_storeu_si512(to, x); }
  __m512i plus, minus, limit;
  const __m512i zero = _mm512_set1_epi8(-128);
  explicit Bytes(const Layer& l)
      : plus(_mm512_loadu_si512(l.delta8[0])),
        minus(_mm512_loadu_si512(l.delta8[1])),
        limit(_mm512_set1_epi8(static_cast<char>(l.largest))) {}
  LNS_INLINE void step(__m512i& code, __m512i& sign, __m512i a, __m512i a_sign, const int8_t* w,
                       const int8_t* w_sign) const {
    const __m512i sum = _mm512_min_epi8(_mm512_adds_epi8(a, _mm512_load_si512(w)), limit);
    const __m512i entry = _mm512_mask_mov_epi8(zero, _mm512_cmpgt_epi8_mask(sum, _mm512_setzero_si512()), sum);
    const __m512i entry_sign = _mm512_xor_si512(a_sign, _mm512_load_si512(w_sign));
    const __m512i big = _mm512_max_epi8(code, entry);
    const __m512i distance = _mm512_sub_epi8(big, _mm512_min_epi8(code, entry));
    const Mask differ = _mm512_test_epi8_mask(_mm512_xor_si512(sign, entry_sign), _mm512_set1_epi8(-1));
    const Mask within = _mm512_cmplt_epu8_mask(distance, _mm512_set1_epi8(64));
    const __m512i delta = _mm512_mask_permutexvar_epi8(_mm512_maskz_permutexvar_epi8(within, distance, plus),
                                                       within & differ, distance, minus);
    const __m512i total = _mm512_min_epi8(_mm512_adds_epi8(big, delta), limit);
    sign = _mm512_mask_mov_epi8(sign, _mm512_cmpgt_epi8_mask(entry, code), entry_sign);
    code = _mm512_mask_mov_epi8(zero, _mm512_cmpgt_epi8_mask(total, _mm512_setzero_si512()), total);
  }
};
#else
template <int kSegments>
struct Bytes {
  using Vector = __m256i;
  static LNS_INLINE Vector all(int8_t x) { return _mm256_set1_epi8(x); }
  static LNS_INLINE Vector load(const int8_t* x) { return _mm256_loadu_si256((const __m256i*)x); }
  static LNS_INLINE void store(int8_t* to, Vector x) { _mm256_storeu_si256((__m256i*)to, x); }
  __m256i plus[kSegments], minus[kSegments], limit;
  explicit Bytes(const Layer& l) : limit(_mm256_set1_epi8(static_cast<char>(l.largest))) {
    for (int s = 0; s < kSegments; ++s) {
      plus[s] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(l.delta8[0] + 16 * s)));
      minus[s] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(l.delta8[1] + 16 * s)));
    }
  }
  LNS_INLINE void step(__m256i& code, __m256i& sign, __m256i a, __m256i a_sign, const int8_t* w,
                       const int8_t* w_sign) const {
    const __m256i none = _mm256_setzero_si256(), zero = _mm256_set1_epi8(-128);
    const __m256i sum = _mm256_min_epi8(_mm256_adds_epi8(a, _mm256_load_si256((const __m256i*)w)), limit);
    const __m256i entry = _mm256_blendv_epi8(zero, sum, _mm256_cmpgt_epi8(sum, none));
    const __m256i entry_sign = _mm256_xor_si256(a_sign, _mm256_load_si256((const __m256i*)w_sign));
    const __m256i big = _mm256_max_epi8(code, entry);
    const __m256i distance = _mm256_sub_epi8(big, _mm256_min_epi8(code, entry));
    /* the top bit of an index makes pshufb give zero: it is set outside of the segment */
    __m256i same = none, other = none;
#pragma GCC unroll 4
    for (int s = 0; s < kSegments; ++s) {
      const __m256i index = _mm256_adds_epu8(_mm256_sub_epi8(distance, _mm256_set1_epi8(static_cast<char>(16 * s))),
                                             _mm256_set1_epi8(112));
      same = _mm256_or_si256(same, _mm256_shuffle_epi8(plus[s], index));
      other = _mm256_or_si256(other, _mm256_shuffle_epi8(minus[s], index));
    }
    const __m256i delta = _mm256_blendv_epi8(same, other, _mm256_xor_si256(sign, entry_sign));
    const __m256i total = _mm256_min_epi8(_mm256_adds_epi8(big, delta), limit);
    sign = _mm256_blendv_epi8(sign, entry_sign, _mm256_cmpgt_epi8(entry, code));
    code = _mm256_blendv_epi8(zero, total, _mm256_cmpgt_epi8(total, none));
  }
};
#endif

template <class Step>
void log8_with(const Tile& t, const Step& step) {
  const Layer& l = *t.layer;
  auto* acc = static_cast<int8_t*>(t.acc);
  const int64_t panels = t.last_panel - t.first_panel;
  const auto* a = static_cast<const int8_t*>(t.a);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = t.group * l.panels + t.first_panel + p;
    const int8_t* w = l.weight_bytes.data() + at * l.depth * kBytes;
    const int8_t* w_sign = l.weight_signs.data() + at * l.depth * kBytes;
    int8_t start[2][kBytes];
    for (int c = 0; c < kBytes; ++c) {
      const int32_t code = l.start_code.empty() ? no_code : l.start_code[static_cast<size_t>(at * kBytes + c)];
      start[0][c] = static_cast<int8_t>(code == no_code ? INT8_MIN : code);
      start[1][c] = static_cast<int8_t>(l.start_code.empty() ? 0 : l.start_minus[static_cast<size_t>(at * kBytes + c)]);
    }
    for (int64_t r = 0; r < t.rows; r += kChains) {
      typename Step::Vector code[kChains], sign[kChains];
      const int8_t* row[kChains];
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        code[i] = Step::load(start[0]);
        sign[i] = Step::load(start[1]);
        row[i] = a + (r + i) * l.depth * 2;
      }
      for (int64_t k = 0; k < l.depth; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          step.step(code[i], sign[i], Step::all(row[i][2 * k]), Step::all(row[i][2 * k + 1]), w + k * kBytes,
                    w_sign + k * kBytes);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        int8_t* out = acc + ((r + i) * panels + p) * 2 * kBytes;
        Step::store(out, code[i]);
        Step::store(out + kBytes, sign[i]);
      }
    }
  }
}

void log8(const Tile& t) {
#if defined(__AVX512VBMI__)
  log8_with(t, Bytes(*t.layer));
#else
  switch ((t.layer->delta_size + 15) / 16) {
    case 0:
    case 1:
      return log8_with(t, Bytes<1>(*t.layer));
    case 2:
      return log8_with(t, Bytes<2>(*t.layer));
    case 3:
      return log8_with(t, Bytes<3>(*t.layer));
    default:
      return log8_with(t, Bytes<4>(*t.layer));
  }
#endif
}
constexpr bool kHasLog8 = true;

/* 16-bit lanes: codes up to 32767, at most 64 steps of Δ, in registers. A zero is −32768. */
#if defined(__AVX512BW__) || defined(__AVX2__)
/* Δ where two codes can be that far apart. Further lie only the distances to a zero, where a long table would still
 * have entries. */
struct Reachable {
  int16_t delta[2][64];
  explicit Reachable(const Layer& l) {
    for (int i = 0; i < 64; ++i) {
      const bool reached = (i << l.delta_shift) <= INT16_MAX;
      for (int j = 0; j < 2; ++j) delta[j][i] = reached ? l.delta16[j][i] : int16_t{0};
    }
  }
};
#endif

#if defined(__AVX512BW__)
struct Words {
  using Vector = __m512i;
  __m512i plus[2], minus[2], largest;
  __m128i shift;
  explicit Words(const Layer& l)
      : largest(_mm512_set1_epi16(static_cast<int16_t>(l.largest))), shift(_mm_cvtsi32_si128(l.delta_shift)) {
    const Reachable table(l);
    for (int i = 0; i < 2; ++i) {
      plus[i] = _mm512_loadu_si512(table.delta[0] + 32 * i);
      minus[i] = _mm512_loadu_si512(table.delta[1] + 32 * i);
    }
  }
  static LNS_INLINE Vector all(int16_t x) { return _mm512_set1_epi16(x); }
  static LNS_INLINE Vector load(const int16_t* x) { return _mm512_loadu_si512(x); }
  static LNS_INLINE void store(int16_t* to, Vector x) { _mm512_storeu_si512(to, x); }
  LNS_INLINE void step(Vector& code, Vector& sign, Vector a, Vector a_sign, const int16_t* w) const {
    const Vector zero = all(INT16_MIN), none = _mm512_setzero_si512();
    const Vector sum = _mm512_min_epi16(_mm512_adds_epi16(a, load(w)), largest);
    const Vector entry = _mm512_mask_mov_epi16(zero, _mm512_cmpgt_epi16_mask(sum, none), sum);
    const Vector entry_sign = _mm512_xor_si512(a_sign, load(w + 32));
    const Vector big = _mm512_max_epi16(code, entry);
    const Vector distance = _mm512_sub_epi16(big, _mm512_min_epi16(code, entry));
    const __mmask32 differ = _mm512_movepi16_mask(_mm512_xor_si512(sign, entry_sign));
    const Vector index = _mm512_srl_epi16(distance, shift);
    const __mmask32 within = _mm512_cmplt_epu16_mask(index, all(64));
    const Vector same = _mm512_maskz_permutex2var_epi16(within, plus[0], index, plus[1]);
    const Vector other = _mm512_maskz_permutex2var_epi16(within, minus[0], index, minus[1]);
    const Vector delta = _mm512_mask_mov_epi16(same, differ, other);
    const Vector total = _mm512_min_epi16(_mm512_adds_epi16(big, delta), largest);
    const __mmask32 cancel = _mm512_mask_testn_epi16_mask(differ, distance, distance);
    sign = _mm512_mask_mov_epi16(sign, _mm512_cmpgt_epi16_mask(entry, code), entry_sign);
    code = _mm512_mask_mov_epi16(zero, _mm512_cmpgt_epi16_mask(total, none) & ~cancel, total);
  }
};
#else
template <int kSegments>
struct Words {
  using Vector = __m256i;
  __m256i plus[kSegments][2], minus[kSegments][2], largest; /* low and high bytes of 16 entries */
  __m128i shift;
  explicit Words(const Layer& l)
      : largest(_mm256_set1_epi16(static_cast<int16_t>(l.largest))), shift(_mm_cvtsi32_si128(l.delta_shift)) {
    const Reachable table(l);
    for (int s = 0; s < kSegments; ++s) {
      for (int high = 0; high < 2; ++high) {
        alignas(16) int8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
          for (int j = 0; j < 2; ++j) bytes[j][i] = static_cast<int8_t>(table.delta[j][16 * s + i] >> (8 * high));
        }
        plus[s][high] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[0]));
        minus[s][high] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[1]));
      }
    }
  }
  static LNS_INLINE Vector all(int16_t x) { return _mm256_set1_epi16(x); }
  static LNS_INLINE Vector load(const int16_t* x) { return _mm256_loadu_si256((const __m256i*)x); }
  static LNS_INLINE void store(int16_t* to, Vector x) { _mm256_storeu_si256((__m256i*)to, x); }
  LNS_INLINE void step(Vector& code, Vector& sign, Vector a, Vector a_sign, const int16_t* w) const {
    const Vector zero = all(INT16_MIN), none = _mm256_setzero_si256();
    const Vector sum = _mm256_min_epi16(_mm256_adds_epi16(a, load(w)), largest);
    const Vector entry = _mm256_blendv_epi8(zero, sum, _mm256_cmpgt_epi16(sum, none));
    const Vector entry_sign = _mm256_xor_si256(a_sign, load(w + 16));
    const Vector big = _mm256_max_epi16(code, entry);
    const Vector distance = _mm256_sub_epi16(big, _mm256_min_epi16(code, entry));
    const Vector differ = _mm256_xor_si256(sign, entry_sign);
    /* the index in the low byte; the high one has the top bit, for which pshufb gives zero */
    const Vector index = _mm256_or_si256(_mm256_min_epu16(_mm256_srl_epi16(distance, shift), all(127)), all(-32768));
    Vector same = none, other = none;
#pragma GCC unroll 4
    for (int s = 0; s < kSegments; ++s) {
      const Vector low = _mm256_adds_epu8(_mm256_sub_epi8(index, all(static_cast<int16_t>(16 * s))), all(112));
      const Vector high = _mm256_or_si256(_mm256_slli_epi16(low, 8), all(128));
      same = _mm256_or_si256(
          same, _mm256_or_si256(_mm256_shuffle_epi8(plus[s][0], low), _mm256_shuffle_epi8(plus[s][1], high)));
      other = _mm256_or_si256(
          other, _mm256_or_si256(_mm256_shuffle_epi8(minus[s][0], low), _mm256_shuffle_epi8(minus[s][1], high)));
    }
    const Vector total = _mm256_min_epi16(_mm256_adds_epi16(big, _mm256_blendv_epi8(same, other, differ)), largest);
    const Vector cancel = _mm256_and_si256(_mm256_cmpeq_epi16(distance, none), differ);
    sign = _mm256_blendv_epi8(sign, entry_sign, _mm256_cmpgt_epi16(entry, code));
    code = _mm256_blendv_epi8(zero, total, _mm256_andnot_si256(cancel, _mm256_cmpgt_epi16(total, none)));
  }
};
#endif

template <class Step>
void log16_with(const Tile& t, const Step& step) {
  constexpr int kLanes16 = kBytes / 2;
  const Layer& l = *t.layer;
  auto* acc = static_cast<int16_t*>(t.acc);
  const int64_t panels = t.last_panel - t.first_panel;
  const auto* a = static_cast<const int16_t*>(t.a);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = t.group * l.panels + t.first_panel + p;
    const int16_t* w = l.weight_shorts.data() + at * l.depth * 2 * kLanes16;
    int16_t start[2][kLanes16];
    for (int c = 0; c < kLanes16; ++c) {
      const int32_t code = l.start_code.empty() ? no_code : l.start_code[static_cast<size_t>(at * kLanes16 + c)];
      start[0][c] = static_cast<int16_t>(code == no_code ? INT16_MIN : code);
      start[1][c] =
          static_cast<int16_t>(l.start_code.empty() ? 0 : l.start_minus[static_cast<size_t>(at * kLanes16 + c)]);
    }
    for (int64_t r = 0; r < t.rows; r += kChains) {
      typename Step::Vector code[kChains], sign[kChains];
      const int16_t* row[kChains];
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        code[i] = Step::load(start[0]);
        sign[i] = Step::load(start[1]);
        row[i] = a + (r + i) * l.depth * 2;
      }
      for (int64_t k = 0; k < l.depth; ++k) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          step.step(code[i], sign[i], Step::all(row[i][2 * k]), Step::all(row[i][2 * k + 1]), w + k * 2 * kLanes16);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        int16_t* out = acc + ((r + i) * panels + p) * 2 * kLanes16;
        Step::store(out, code[i]);
        Step::store(out + kLanes16, sign[i]);
      }
    }
  }
}

void log16(const Tile& t) {
#if defined(__AVX512BW__)
  log16_with(t, Words(*t.layer));
#else
  switch ((t.layer->delta_size + 15) / 16) {
    case 0:
    case 1:
      return log16_with(t, Words<1>(*t.layer));
    case 2:
      return log16_with(t, Words<2>(*t.layer));
    default:
      return log16_with(t, Words<4>(*t.layer));
  }
#endif
}
constexpr bool kHasLog16 = true;
#else
void log8(const Tile&) {}
void log16(const Tile&) {}
constexpr bool kHasLog8 = false, kHasLog16 = false;
#endif

#if defined(__AVX512F__)
constexpr int kFast = 8, kSlow = 4;
#else
constexpr int kFast = 4, kSlow = 2;
#endif

}  // namespace

const Isa& LNS_JOIN(isa_, LNS_ISA_NAME)() {
  static const Isa isa = {
      LNS_ISA_ID,
      LNS_STRING(LNS_ISA_NAME),
      {4 * V, 1, shifted},
      {kPanel, 1, expanded<kWrap>},
      {kPanel, 1, expanded<kSaturate>},
      {V, 1, expanded_bins},
      {kPanel, kFast, linear<Fp32, kWrap, kFast>},
      {kPanel, kFast, linear<Fp32, kSaturate, kFast>},
      {kPanel, kSlow, linear<Fp32, kLanes, kSlow>},
      {kPanel, 2, fp32_wide},
      {kPanel, kFast, linear<Mitchell, kWrap, kFast>},
      {kPanel, kFast, linear<Mitchell, kSaturate, kFast>},
      {kPanel, kSlow, linear<Mitchell, kLanes, kSlow>},
      {kPanel, 2, gather_terms},
      {V, 1, bins},
      {kBytes, kChains, log8},
      {kBytes / 2, kChains, log16},
      {V, kChains, log32},
      kHasLog8,
      kHasLog16,
      kBytes == 64,
      kBytes != 32,
  };
  return isa;
}

}  // namespace lns
