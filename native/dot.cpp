/* Dot products: a layer is checked, the fastest kernel that gives its bits is chosen, and its weights are packed;
 * runs go through tiles of rows (spec 3 to 5, 7). */
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>

#include "internal.h"

struct lns_dot {
  lns::Layer layer;
  explicit lns_dot(lns_output output) : layer(output) {}
};

namespace lns {
namespace {

constexpr int64_t kRowTile = 32;
constexpr int64_t kAccBytes = 1 << 18;

/* Δ beyond this, and codes beyond, are left to 64 bits. */
constexpr int64_t kMaxDelta = 1 << 27;

struct Terms {
  const lns_dot_desc& d;
  int64_t operator()(int64_t bin, int64_t p) const {
    const int64_t i = bin * d.term_columns + p;
    return d.terms_are_64 ? static_cast<const int64_t*>(d.terms)[i] : static_cast<const int32_t*>(d.terms)[i];
  }
};

void need(const void* pointer, const char* what) {
  if (!pointer) fail(LNS_BAD_VALUE, "%s is missing", what);
}

void need_range(int64_t value, int64_t low, int64_t high, const char* what) {
  if (value < low || value > high) {
    fail(LNS_BAD_VALUE, "%s must be %lld to %lld, not %lld", what, static_cast<long long>(low),
         static_cast<long long>(high), static_cast<long long>(value));
  }
}

void check(const lns_dot_desc& d) {
  check_format(d.activation, "activations");
  check_format(d.weight, "weights");
  need_range(d.log, 0, 1, "log");
  need_range(d.activation_widen, 1, 1 << 24, "activation_widen");
  need_range(d.weight_widen, 1, 1 << 24, "weight_widen");
  need_range(d.groups, 1, INT64_MAX, "groups");
  need_range(d.channels, 0, int64_t{1} << 40, "channels");
  need_range(d.depth, 0, int64_t{1} << 40, "depth");
  if (d.channels % d.groups) {
    fail(LNS_BAD_VALUE, "%lld channels do not divide into %lld groups", static_cast<long long>(d.channels),
         static_cast<long long>(d.groups));
  }
  if (product(d.channels, d.depth)) need(d.weight_words, "weight_words");
  need_range(d.lanes, 1, 1024, "lanes");
  if (d.channels) need(d.code_shift, "code_shift");
  for (int64_t n = 0; n < d.channels; ++n) {
    need_range(d.code_shift[n], -(int64_t{1} << 56), int64_t{1} << 56, "code_shift");
  }
  if (d.log) {
    need_range(d.acc_bits, 1, 40, "acc_bits");
    need_range(d.guard_bits, 0, 8, "guard_bits");
    need_range(d.delta_plus_count, 0, 1 << 28, "the length of delta_plus");
    need_range(d.delta_minus_count, 0, 1 << 28, "the length of delta_minus");
    if (d.delta_plus_count) need(d.delta_plus, "delta_plus");
    if (d.delta_minus_count) need(d.delta_minus, "delta_minus");
    if (d.channels) need(d.entry_shift, "entry_shift");
    for (int64_t n = 0; n < d.channels; ++n) {
      need_range(d.entry_shift[n], -(int64_t{1} << 50), int64_t{1} << 50, "entry_shift");
    }
    return;
  }
  need_range(d.acc_bits, 2, 62, "acc_bits");
  need_range(d.psum_bits, 2, 62, "psum_bits");
  need_range(d.saturate, 0, 1, "saturate");
  need_range(d.terms_are_64, 0, 1, "terms_are_64");
  need_range(d.bins, 1, 1 << 16, "bins");
  need(d.terms, "terms");
  need(d.constants, "constants");
  const int64_t columns = max_code(d.activation) * d.activation_widen + max_code(d.weight) * d.weight_widen + 1;
  if (d.term_columns != columns) {
    fail(LNS_BAD_VALUE, "terms have %lld columns; code sums up to %lld need %lld",
         static_cast<long long>(d.term_columns), static_cast<long long>(columns - 1), static_cast<long long>(columns));
  }
  product(d.bins, d.term_columns);
  if (d.threshold_count) need(d.thresholds, "thresholds");
}

/* ---- what a table of terms is made of --------------------------------------------------------------------- */

/* terms[γq + r] = ⌊s_r·2^(q + exponent)⌋, with s_r either 2^(r/γ) rounded to `bits` bits or 1 + r/γ. */
struct Structure {
  bool found = false, mitchell = false;
  bool narrow = false; /* float32 gives the products too */
  int f = 0, bits = 0, exponent = 0;
  std::vector<double> base; /* 2^(r/γ) */
};

/* A significand is rounded to some bits by an integer addition to a number's bits, and a mask. */
template <class Float>
struct Rounds;
template <>
struct Rounds<float> {
  using Bits = uint32_t;
  static constexpr int significand = 23;
};
template <>
struct Rounds<double> {
  using Bits = uint64_t;
  static constexpr int significand = 52;
};

template <class Float>
typename Rounds<Float>::Bits round_add(int bits) {
  constexpr int all = Rounds<Float>::significand;
  return bits < all ? typename Rounds<Float>::Bits{1} << (all - 1 - bits) : 0;
}
template <class Float>
typename Rounds<Float>::Bits round_mask(int bits) {
  return ~((typename Rounds<Float>::Bits{1} << (Rounds<Float>::significand - bits)) - 1);
}
template <class Float>
Float rounded(Float x, int bits) {
  typename Rounds<Float>::Bits raw;
  std::memcpy(&raw, &x, sizeof raw);
  raw = (raw + round_add<Float>(bits)) & round_mask<Float>(bits);
  std::memcpy(&x, &raw, sizeof raw);
  return x;
}

/* Whether products of powers, rounded to `bits` bits, depend on the sum of remainders alone: a fact about
 * (γ, bits) that holds or not, checked for all γ² pairs. */
template <class Float>
bool products_are_exact(int f, int bits, const std::vector<double>& powers) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, bool> known;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({f, bits});
    if (found != known.end()) return found->second;
  }
  const int gamma = 1 << f;
  const std::vector<Float> base(powers.begin(), powers.end());
  std::vector<Float> wanted(static_cast<size_t>(2 * gamma));
  for (int r = 0; r < gamma; ++r) {
    wanted[static_cast<size_t>(r)] = static_cast<Float>(rounded(powers[static_cast<size_t>(r)], bits));
    wanted[static_cast<size_t>(r + gamma)] = 2 * wanted[static_cast<size_t>(r)];
  }
  bool exact = true;
  for (int a = 0; a < gamma && exact; ++a) {
    for (int b = a; b < gamma; ++b) {
      if (rounded(base[static_cast<size_t>(a)] * base[static_cast<size_t>(b)], bits) !=
          wanted[static_cast<size_t>(a + b)]) {
        exact = false;
        break;
      }
    }
  }
  std::lock_guard<std::mutex> lock(mutex);
  known[{f, bits}] = exact;
  return exact;
}

Structure structure_of(const lns_dot_desc& d) {
  Structure s;
  const Terms terms{d};
  const int64_t largest = d.term_columns - 1;
  for (s.f = 0; s.f <= 12; ++s.f) {
    const int64_t gamma = int64_t{1} << s.f, top = largest >> s.f;
    if (top < 1 || top > 120) continue;
    const int64_t one = terms(0, gamma * top);
    if (one < 1 || (one & (one - 1))) continue;
    s.exponent = 63 - __builtin_clzll(static_cast<uint64_t>(one)) - static_cast<int>(top);
    const auto agrees = [&](const auto& significand) {
      for (int64_t p = largest; p >= 2; --p) {
        const double value = std::ldexp(significand(p & (gamma - 1)), static_cast<int>(p >> s.f) + s.exponent);
        if (value >= 9e18 || static_cast<int64_t>(value) != terms(0, p)) return false;
      }
      return true;
    };
    if (agrees([&](int64_t r) { return 1 + static_cast<double>(r) / static_cast<double>(gamma); })) {
      s.found = s.mitchell = true;
      return s;
    }
    s.base.resize(static_cast<size_t>(gamma));
    for (int64_t r = 0; r < gamma; ++r) {
      s.base[static_cast<size_t>(r)] = std::exp2(static_cast<double>(r) / static_cast<double>(gamma));
    }
    for (s.bits = 0; s.bits <= 40; ++s.bits) {
      if (agrees([&](int64_t r) { return rounded(s.base[static_cast<size_t>(r)], s.bits); }) &&
          products_are_exact<double>(s.f, s.bits, s.base)) {
        s.found = true;
        s.narrow = s.bits <= 23 && products_are_exact<float>(s.f, s.bits, s.base);
        return s;
      }
    }
  }
  return s;
}

/* ---- packing ------------------------------------------------------------------------------------------------ */

struct Weights {
  const lns_dot_desc& d;
  const int bytes = bytes_of(d.weight);
  uint32_t word(int64_t channel, int64_t k) const {
    return load_word(d.weight_words, bytes, channel * d.depth + k) & ((1u << d.weight.bits) - 1);
  }
};

/* Call put(destination index, word, channel) for every packed weight; `empty(destination index)` where a panel has no
 * column. */
template <class Put, class Empty>
void pack(const Layer& l, const lns_dot_desc& d, Put put, Empty empty) {
  const Weights weights{d};
  const int width = l.kernel.panel;
  for (int64_t g = 0; g < l.groups; ++g) {
    for (int64_t p = 0; p < l.panels; ++p) {
      for (int64_t c = 0; c < width; ++c) {
        const int64_t column = p * width + c, channel = g * l.columns + column;
        const int64_t base = (g * l.panels + p) * l.depth;
        for (int64_t k = 0; k < l.depth; ++k) {
          if (column < l.columns) {
            put(base + k, c, weights.word(channel, k), channel);
          } else {
            empty(base + k, c);
          }
        }
      }
    }
  }
}

/* One value a channel, laid out as the accumulators of a row. */
template <class T, class From>
std::vector<T> per_column(const Layer& l, T nothing, From from) {
  const int width = l.kernel.panel;
  std::vector<T> made(static_cast<size_t>(l.groups * l.panels * width), nothing);
  for (int64_t g = 0; g < l.groups; ++g) {
    for (int64_t c = 0; c < l.columns; ++c) {
      made[static_cast<size_t>(g * l.panels * width + c)] = from(g * l.columns + c);
    }
  }
  return made;
}

template <class T, class From>
std::vector<T> by_word(lns_format f, From from) {
  std::vector<T> made(size_t{1} << f.bits);
  for (uint32_t word = 0; word < made.size(); ++word) made[word] = from(code_of(word, f), negative(word, f));
  return made;
}

int64_t packed_size(const Layer& l) { return product(product(l.groups * l.panels, l.depth), l.kernel.panel); }

void set_kernel(Layer& l, Kind kind, const Kernel& kernel, const std::string& name) {
  l.kind = kind;
  l.kernel = kernel;
  l.panels = (l.columns + kernel.panel - 1) / kernel.panel;
  l.kernel_name = name;
}

/* Octaves that activations are shifted down by, so that they lie around 1. */
int fp32_middle(const lns_dot_desc& d, const Structure& s) {
  return static_cast<int>((max_code(d.activation) * d.activation_widen) >> s.f) / 2;
}

/* Words as powers of two times `exponent` more octaves. */
template <class Float>
std::vector<Float> powers_of(lns_format f, int64_t widen, const Structure& s, int exponent) {
  return by_word<Float>(f, [&](uint32_t code, bool minus) {
    if (!code) return Float{0};
    const int64_t wide = code * widen, gamma = int64_t{1} << s.f;
    const auto base = static_cast<Float>(s.base[static_cast<size_t>(wide & (gamma - 1))]);
    const Float x = std::ldexp(base, static_cast<int>(wide >> s.f) + exponent);
    return minus ? -x : x;
  });
}

template <class T>
void pack_weights(const Layer& l, const lns_dot_desc& d, const std::vector<T>& of_word, Buffer<T>& weights) {
  weights.resize(packed_size(l));
  const int width = l.kernel.panel;
  pack(
      l, d, [&](int64_t at, int64_t c, uint32_t word, int64_t) { weights[at * width + c] = of_word[word]; },
      [&](int64_t at, int64_t c) { weights[at * width + c] = 0; });
}

void pack_fp32(Layer& l, const lns_dot_desc& d, const Structure& s) {
  const int middle = fp32_middle(d, s);
  l.activation_size = 4;
  l.activation_floats = powers_of<float>(d.activation, d.activation_widen, s, -middle);
  pack_weights(l, d, powers_of<float>(d.weight, d.weight_widen, s, s.exponent + middle), l.weight_floats);
  l.round_add = static_cast<int32_t>(round_add<float>(s.bits));
  l.round_mask = static_cast<int32_t>(round_mask<float>(s.bits));
}

void pack_fp64(Layer& l, const lns_dot_desc& d, const Structure& s) {
  l.activation_size = 8;
  l.activation_doubles = powers_of<double>(d.activation, d.activation_widen, s, 0);
  pack_weights(l, d, powers_of<double>(d.weight, d.weight_widen, s, s.exponent), l.weight_doubles);
  l.wide_round_add = static_cast<int64_t>(round_add<double>(s.bits));
  l.wide_round_mask = static_cast<int64_t>(round_mask<double>(s.bits));
}

void pack_ints(Layer& l, const lns_dot_desc& d, const std::vector<int32_t>& weights) {
  l.activation_size = 4;
  pack_weights(l, d, weights, l.weight_ints);
}

void pack_mitchell(Layer& l, const lns_dot_desc& d, const Structure& s) {
  /* exponents 64 and 63 + exponent: a sum has 127 + exponent, and with a zero, less than 127 */
  const auto packed = [&](uint32_t code, bool minus, int64_t widen, int exponent) {
    if (!code) return 0;
    const uint32_t bits = (static_cast<uint32_t>(exponent) << 23) + (static_cast<uint32_t>(code * widen) << (23 - s.f));
    return static_cast<int32_t>(bits | (minus ? 0x80000000u : 0));
  };
  l.activation_ints = by_word<int32_t>(
      d.activation, [&](uint32_t code, bool minus) { return packed(code, minus, d.activation_widen, 64); });
  pack_ints(l, d, by_word<int32_t>(d.weight, [&](uint32_t code, bool minus) {
              return packed(code, minus, d.weight_widen, 63 + s.exponent);
            }));
}

/* Codes such that a sum indexes l.table: nonzero codes are shifted by the other side's largest, so that sums of two
 * nonzero codes lie above all others, where the table begins. */
void pack_codes(Layer& l, const lns_dot_desc& d, const std::function<int32_t(int64_t)>& entry) {
  const int64_t a_max = max_code(d.activation) * d.activation_widen, w_max = max_code(d.weight) * d.weight_widen;
  const auto packed = [](uint32_t code, bool minus, int64_t widen, int64_t shift) {
    if (!code) return 0;
    return static_cast<int32_t>(static_cast<uint32_t>(code * widen + shift) | (minus ? 0x80000000u : 0));
  };
  l.activation_ints = by_word<int32_t>(
      d.activation, [&](uint32_t code, bool minus) { return packed(code, minus, d.activation_widen, w_max); });
  pack_ints(l, d, by_word<int32_t>(d.weight, [&](uint32_t code, bool minus) {
              return packed(code, minus, d.weight_widen, a_max);
            }));
  l.table.resize(2 * (a_max + w_max) + 1);
  for (int64_t i = 0; i < l.table.size(); ++i) l.table[i] = i >= a_max + w_max + 2 ? entry(i - a_max - w_max) : 0;
}

/* Integers that an accumulator with bins takes: a whole vector. */
int64_t bin_stride(const lns_dot_desc& d) { return d.bins <= 4 ? 4 : d.bins <= 8 ? 8 : 16; }

/* Entries of the table of bins: code sums, as many zeros as there are activation codes, and code sums again, for
 * negative products. */
int64_t bins_entries(const lns_dot_desc& d) {
  return 2 * d.term_columns + max_code(d.activation) * d.activation_widen + 1;
}

constexpr int64_t kBinsTable = int64_t{1} << 26;
int64_t bins_table_size(const lns_dot_desc& d) {
  return d.term_columns < kBinsTable ? bins_entries(d) * bin_stride(d) * 4 : INT64_MAX;
}

/* A product's vector lies where the activation begins in the table, and an index further. An index, in units of 8
 * bytes, is a weight's code, past all sums if their signs differ, and at the zeros for a weight of zero. A panel is a
 * record of zeros, and one for each k: indices for positive activations, then for negative ones. An activation is
 * packed as its beginning, and in the high half a mask that leaves of a record's place what it needs: all for a
 * negative one, all but the second half of the record for a positive one, nothing for zero, which so takes the record
 * of zeros. bin_entries puts the place there itself. */
void pack_bins(Layer& l, const lns_dot_desc& d, const std::vector<int32_t>& bin_of) {
  const Terms terms{d};
  const int64_t a_max = max_code(d.activation) * d.activation_widen, sums = d.term_columns;
  const int64_t stride = bin_stride(d), unit = stride * 4 / 8;
  const int64_t zeros = sums, negatives = sums + a_max + 1;
  l.bin_stride = stride;
  l.table.resize(bins_entries(d) * stride);
  std::fill(l.table.data(), l.table.data() + l.table.size(), 0);
  for (int64_t p = 2; p < sums; ++p) {
    const int32_t bin = bin_of[static_cast<size_t>(p)];
    if (bin < 0) continue;
    const auto term = static_cast<int32_t>(std::min<int64_t>(terms(bin, p), INT32_MAX));
    l.table[p * stride + bin] = term;
    l.table[(negatives + p) * stride + bin] = -term;
  }
  for (int64_t b = 0; b < d.bins; ++b) l.bin_constants[b] = static_cast<double>(d.constants[b]);
  l.short_records = bins_entries(d) * unit <= UINT16_MAX;
  const int64_t record = 2 * bins_panel * (l.short_records ? 2 : 4);
  l.activation_size = 8;
  l.activation_longs = by_word<int64_t>(d.activation, [&](uint32_t code, bool minus) -> int64_t {
    if (!code) return 0;
    const int64_t kept = minus ? -1 : ~(record / 2);
    return static_cast<int64_t>(static_cast<uint64_t>(kept) << 32 |
                                static_cast<uint64_t>(code * d.activation_widen * stride * 4));
  });
  const auto fill = [&](auto* to) {
    using Index = std::remove_reference_t<decltype(*to)>;
    const auto zero = static_cast<Index>(zeros * unit);
    const auto indices = [&](bool other) {
      return by_word<Index>(d.weight, [&](uint32_t code, bool minus) {
        return code ? static_cast<Index>((code * d.weight_widen + (minus != other ? negatives : 0)) * unit) : zero;
      });
    };
    const auto plus = indices(false), minus = indices(true);
    const auto at = [&](int64_t panel_depth) {
      /* a panel's first record is that of zeros */
      return to + (panel_depth + panel_depth / l.depth + 1) * 2 * bins_panel;
    };
    for (int64_t p = 0; p < l.groups * l.panels; ++p) {
      std::fill_n(to + p * (l.depth + 1) * 2 * bins_panel, 2 * bins_panel, zero);
    }
    pack(
        l, d,
        [&](int64_t depth, int64_t c, uint32_t word, int64_t) {
          at(depth)[c] = plus[word];
          at(depth)[bins_panel + c] = minus[word];
        },
        [&](int64_t depth, int64_t c) { at(depth)[c] = at(depth)[bins_panel + c] = zero; });
  };
  l.weight_records.resize(product(product(l.groups * l.panels, l.depth + 1), record));
  if (l.short_records) {
    fill(reinterpret_cast<uint16_t*>(l.weight_records.data()));
  } else {
    fill(reinterpret_cast<uint32_t*>(l.weight_records.data()));
  }
}

/* Packed activations as the kernel takes them: in the low half the beginning in the table, in the high one the place
 * of the record, from that of the panel. Zeros are left out of a block where no step counts them. */
void bin_entries(const Layer& l, uint64_t* packed, int64_t rows, int32_t* counts) {
  const int64_t record = 2 * bins_panel * (l.short_records ? 2 : 4);
  const bool counted = l.saturate && l.step_limit >= 0;
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t* const row = packed + r * l.depth;
    for (int64_t first = 0; first < l.depth; first += l.bin_block) {
      uint64_t* to = row + first;
      for (int64_t k = first; k < std::min(first + l.bin_block, l.depth); ++k) {
        const auto kept = static_cast<int64_t>(row[k]) >> 32;
        const auto place = static_cast<uint64_t>(((k + 1) * record | record / 2) & kept);
        *to = place << 32 | (row[k] & UINT32_MAX);
        to += counted || kept != 0;
      }
      *counts++ = static_cast<int32_t>(to - row - first);
    }
  }
}

std::vector<int64_t> longs(lns_format f, int64_t widen) {
  return by_word<int64_t>(f, [&](uint32_t code, bool minus) { return 2 * code * widen + minus; });
}

void pack_general(Layer& l, const lns_dot_desc& d) {
  l.activation_size = 8;
  l.activation_longs = longs(d.activation, d.activation_widen);
  const auto weights = longs(d.weight, d.weight_widen);
  l.weight_longs.resize(static_cast<size_t>(product(d.channels, d.depth)));
  const Weights words{d};
  for (int64_t n = 0; n < d.channels; ++n) {
    for (int64_t k = 0; k < d.depth; ++k)
      l.weight_longs[static_cast<size_t>(n * d.depth + k)] = weights[words.word(n, k)];
  }
}

/* Rows from which on it pays to lay out all terms of a weight. */
constexpr int64_t kExpandedRows = 192;
/* Rows of a task, at most: their packed activations stay near. */
constexpr int64_t kExpandedTile = 1024;
/* Bytes of a task's packed activations, at most, unless they are of fewer rows than pay. */
constexpr int64_t kExpandedBytes = 1 << 22;

/* What expanded and shifted kernels share: terms by code sum, entry(P), and codes of weights in panels. */
void make_panels(Layer& l, const lns_dot_desc& d, const Kernel& kernel, const std::function<int32_t(int64_t)>& entry) {
  l.expands = true;
  l.expanded = kernel;
  const int width = l.expanded.panel;
  l.expanded_panels = (l.columns + width - 1) / width;
  l.zero_stream = d.term_columns + expanded_codes;
  l.term_stream.resize(l.zero_stream + 2 * expanded_codes);
  for (int64_t i = 0; i < l.term_stream.size(); ++i) {
    l.term_stream[i] = i >= 2 && i < d.term_columns ? entry(i) : 0;
  }
  const auto codes = by_word<int16_t>(d.weight, [&](uint32_t code, bool minus) {
    return static_cast<int16_t>((minus ? -1 : 1) * static_cast<int64_t>(code * d.weight_widen));
  });
  const Weights weights{d};
  l.weight_codes.resize(product(product(l.groups * l.expanded_panels, l.depth), width));
  for (int64_t g = 0; g < l.groups; ++g) {
    for (int64_t c = 0; c < l.expanded_panels * width; ++c) {
      const int64_t at = (g * l.expanded_panels + c / width) * l.depth * width + c % width;
      for (int64_t k = 0; k < l.depth; ++k) {
        l.weight_codes[at + k * width] = c < l.columns ? codes[weights.word(g * l.columns + c, k)] : int16_t{0};
      }
    }
  }
}

/* One value a channel, laid out as the accumulators of a row of these panels. */
std::vector<int32_t> per_panel_column(const Layer& l, const std::function<int32_t(size_t)>& from) {
  const int64_t row = l.expanded_panels * l.expanded.panel;
  std::vector<int32_t> made(static_cast<size_t>(l.groups * row), 0);
  for (int64_t n = 0; n < l.groups * l.columns; ++n) {
    made[static_cast<size_t>(n / l.columns * row + n % l.columns)] = from(static_cast<size_t>(n));
  }
  return made;
}

/* entry(P) is what a row of terms holds for a code sum. */
void make_expanded(Layer& l, const lns_dot_desc& d, const Kernel& kernel, const std::vector<int64_t>& bias,
                   const std::function<int32_t(int64_t)>& entry) {
  const int64_t a_max = max_code(d.activation) * d.activation_widen, w_max = max_code(d.weight) * d.weight_widen;
  if (a_max >= expanded_codes || w_max > INT16_MAX || (l.saturate && l.lanes > 1)) return;
  make_panels(l, d, kernel, entry);
  l.activation_rows = by_word<uint16_t>(d.activation, [&](uint32_t code, bool minus) {
    return static_cast<uint16_t>((code * d.activation_widen + (minus ? expanded_codes : 0)) * kernel.panel * 4);
  });
  if (d.bias) l.expanded_start = per_panel_column(l, [&](size_t n) { return static_cast<int32_t>(bias[n]); });
}

/* The γ for which terms[P] = ⌊terms[P + γ]/2⌋ throughout, or 0. */
int64_t shift_gamma(const lns_dot_desc& d) {
  const Terms terms{d};
  const int64_t a_max = max_code(d.activation) * d.activation_widen;
  for (int64_t gamma = 1; gamma <= shifted_gamma; gamma *= 2) {
    if ((a_max + 1) % gamma || a_max < gamma || a_max / gamma > 31 || terms(0, d.term_columns - 1) == 0) continue;
    bool holds = true;
    for (int64_t p = 2; p + gamma < d.term_columns && holds; ++p) holds = terms(0, p) == terms(0, p + gamma) >> 1;
    if (holds) return gamma;
  }
  return 0;
}

/* Sums that wrap, of words of up to 8 bits, whose terms of an octave are those of the next, shifted. Accumulators above
 * 32 bits are kept in two parts (see the kernel): a multiple of 2^unit, of 32 bits, and what is below. A term of an
 * activation of a high octave is such a multiple whatever the weight; those of the others, which are few, are added up
 * for a block of depth. Returns whether all that holds. */
bool make_shifted(Layer& l, const lns_dot_desc& d, const Kernel& kernel, const std::vector<int64_t>& bias) {
  const Terms terms{d};
  const int64_t a_max = max_code(d.activation) * d.activation_widen, w_max = max_code(d.weight) * d.weight_widen;
  if (d.activation.bits > 8 || w_max > INT16_MAX) return false;
  const int64_t gamma = shift_gamma(d);
  if (!gamma) return false;
  const int64_t top = a_max / gamma;
  const int unit = std::max(d.acc_bits - 32, 0);
  /* results are taken by float32 of either part, or of both together where these are 31 bits */
  if (unit > 7) return false;
  /* of terms of an octave of activations: whether all are multiples, and the largest */
  const auto whole = [&](int64_t octave) {
    for (int64_t p = octave * gamma + 1; p <= octave * gamma + gamma - 1 + w_max; ++p) {
      if (p >= 2 && terms(0, p) & ((int64_t{1} << unit) - 1)) return false;
    }
    return true;
  };
  int64_t high = top + 1;
  while (high > 0 && whole(high - 1)) --high;
  if (terms(0, d.term_columns - 1) >> unit > INT32_MAX) return false;
  if (high > 0 && (high > top || terms(0, high * gamma - 1 + w_max) > INT32_MAX / shifted_depth ||
                   l.depth > (int64_t{1} << 30 >> unit))) {
    return false;
  }
  l.shifts = true;
  l.gamma = gamma;
  l.unit = unit;
  l.truncates = false;
  for (int64_t p = 2; p + gamma < d.term_columns; ++p) {
    l.truncates = l.truncates || terms(0, p + gamma) != 2 * terms(0, p);
  }
  make_panels(l, d, kernel, [&](int64_t p) { return static_cast<int32_t>(terms(0, p) >> unit); });
  l.activation_low.assign(size_t{1} << d.activation.bits, 0);
  l.activation_shifts = by_word<ShiftedEntry>(d.activation, [&](uint32_t code, bool minus) {
    const int64_t c = code * d.activation_widen, octave = c / gamma;
    if (!code) return ShiftedEntry{UINT32_MAX, 0};
    const int64_t shift = top - octave - (octave < high ? unit : 0);
    return ShiftedEntry{static_cast<uint32_t>(shift >= 0 ? shift : -shift << shifted_left),
                        static_cast<uint32_t>(((minus ? gamma : 0) + c % gamma) * kernel.panel * 4)};
  });
  for (uint32_t word = 0; word < l.activation_low.size(); ++word) {
    const uint32_t code = code_of(word, d.activation);
    l.activation_low[word] = unit && code && code * d.activation_widen / gamma < high;
  }
  if (gamma <= 8) {
    /* sums end within an octave: the terms that are missing at its end would be shifted once at least */
    const int64_t end = (d.term_columns - 1) / gamma * gamma + gamma - 1;
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t p = end - i % gamma;
      const int64_t term = p < d.term_columns ? terms(0, p) : 2 * terms(0, p - gamma);
      l.octave[i] = static_cast<int32_t>(static_cast<uint32_t>(term >> unit));
    }
    l.octave_first = static_cast<int32_t>(end - (a_max - gamma + 1));
  }
  if (d.bias) {
    l.expanded_start = per_panel_column(l, [&](size_t n) { return static_cast<int32_t>(bias[n] >> unit); });
    if (unit) {
      l.low_start =
          per_panel_column(l, [&](size_t n) { return static_cast<int32_t>(bias[n] & ((int64_t{1} << unit) - 1)); });
    }
  }
  return true;
}

/* ---- saturation that cannot happen ---------------------------------------------------------------------------- */

/* Depth over which sums are bounded at a time: short enough for a bound on magnitudes to hold often, long enough for
 * its check to cost nothing. */
constexpr int64_t kBoundDepth = 32;

/* A saturating sum of a block of depth is a plain one where no partial sum can leave its range, and none can where
 * the sum before the block and a bound on the block's magnitudes stay below the limit. The bound: every term is at
 * most u(a)·v(w), where u(a) is about 2^(a/rate), and v(w) the least multiple of 2^(w/rate) for which that holds of the
 * whole table; so the block's magnitudes add up to at most Σu·max v. `rate` codes double a term; it only has to be
 * right for the bound to be tight. Where activations are packed as floats (`own_floats`, times 2^scale), these are u.
 */
void bound_terms(Layer& l, const lns_dot_desc& d, double rate, bool own_floats, int scale) {
  const Terms terms{d};
  const int64_t a_max = max_code(d.activation) * d.activation_widen, top = d.term_columns - 1;
  if (!l.saturate || a_max > UINT16_MAX || l.depth == 0) return;
  const auto peak = [&](int64_t p) {
    int64_t most = 0;
    for (int64_t b = 0; b < d.bins; ++b) most = std::max(most, terms(b, p));
    return static_cast<double>(most);
  };
  if (rate == 0) {
    /* over some octaves, as terms of bins double in steps */
    const double most = peak(top);
    const int octaves = most >= 256 ? 8 : 1;
    int64_t below = top;
    while (below >= 2 && peak(below) > std::ldexp(most, -octaves)) --below;
    if (most < 2 || below < 2) return;
    rate = static_cast<double>(top - below) / octaves;
  }
  double factor = 0;
  for (int64_t p = 2; p <= top; ++p) {
    factor = std::max(factor, peak(p) * std::exp2(static_cast<double>(top - p) / rate));
  }
  /* more than the rounding of as many float32 as a block can have */
  factor *= 1.0002;
  const int64_t origin = own_floats ? 0 : a_max;
  if (!own_floats) {
    l.activation_bounds.resize(static_cast<size_t>(a_max + 1));
    for (int64_t a = 1; a <= a_max; ++a) {
      l.activation_bounds[static_cast<size_t>(a)] =
          static_cast<float>(std::exp2(static_cast<double>(a - a_max) / rate));
    }
  }
  const auto bounds = by_word<float>(d.weight, [&](uint32_t code, bool) {
    const double exponent = static_cast<double>(code * d.weight_widen + origin - top) / rate - scale;
    return code ? static_cast<float>(factor * std::exp2(exponent)) : 0.0f;
  });
  l.bounded = true;
  l.bound_depth = (kBoundDepth + l.lanes - 1) / l.lanes * l.lanes;
  const int64_t blocks = (l.depth + l.bound_depth - 1) / l.bound_depth;
  l.weight_bounds.resize(product(l.groups * l.panels, blocks));
  std::fill(l.weight_bounds.data(), l.weight_bounds.data() + l.weight_bounds.size(), 0.0f);
  pack(
      l, d,
      [&](int64_t at, int64_t, uint32_t word, int64_t) {
        float& most = l.weight_bounds[at / l.depth * blocks + at % l.depth / l.bound_depth];
        most = std::max(most, bounds[word]);
      },
      [](int64_t, int64_t) {});
}

/* Σu of every row and block of depth of packed activations; for saturating bins without steps the largest u, as their
 * sums are looked at more often. */
void sum_bounds(const Layer& l, const void* packed, int64_t rows, float* sums) {
  const bool peaks = l.kind == Kind::bins && l.step_limit < 0;
  const auto add = [&](const auto* a, auto bound_of) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t first = 0; first < l.depth; first += l.bound_depth) {
        float sum = 0;
        for (int64_t k = first; k < std::min(first + l.bound_depth, l.depth); ++k) {
          const float bound = bound_of(a[r * l.depth + k]);
          sum = peaks ? std::max(sum, bound) : sum + bound;
        }
        *sums++ = sum;
      }
    }
  };
  const float* bounds = l.activation_bounds.data();
  if (l.kind == Kind::fp64) {
    add(static_cast<const double*>(packed), [](double a) { return static_cast<float>(std::fabs(a)); });
  } else if (bounds == nullptr) {
    add(static_cast<const float*>(packed), [](float a) { return std::fabs(a); });
  } else if (l.kind == Kind::bins) {
    const auto bytes = static_cast<uint32_t>(l.bin_stride * 4);
    add(static_cast<const int64_t*>(packed), [=](int64_t a) { return bounds[static_cast<uint32_t>(a) / bytes]; });
  } else {
    const int32_t shift = static_cast<int32_t>(max_code(l.weight) * l.weight_widen);
    add(static_cast<const int32_t*>(packed), [=](int32_t a) { return bounds[std::max((a & INT32_MAX) - shift, 0)]; });
  }
}

/* ---- choosing: linear -------------------------------------------------------------------------------------- */

void make_linear(Layer& l, const lns_dot_desc& given, const Isa& isa) {
  /* One bin's constant c needs no product: c·|A| reaches a threshold where |A| reaches that divided by c, rounded up.
   */
  static constexpr int64_t one = 1;
  lns_dot_desc d = given;
  std::vector<int64_t> divided;
  if (d.bins == 1 && d.constants[0] > 1) {
    const int64_t c = d.constants[0];
    l.raw.build(d.thresholds, d.threshold_count); /* which refuses those that are not sorted, or below 1 */
    divided.reserve(static_cast<size_t>(d.threshold_count));
    for (int64_t i = 0; i < d.threshold_count; ++i) divided.push_back((d.thresholds[i] - 1) / c + 1);
    d.thresholds = divided.data();
    d.constants = &one;
  }
  const Terms terms{d};
  const Weights weights{d};
  l.raw.build(d.thresholds, d.threshold_count);
  l.constants.assign(d.constants, d.constants + d.bins);
  /* no term beyond those of the heaviest weight can occur */
  int64_t heaviest = 0;
  for (int64_t n = 0; n < d.channels; ++n) {
    for (int64_t k = 0; k < d.depth; ++k) {
      heaviest = std::max<int64_t>(heaviest, code_of(weights.word(n, k), d.weight));
    }
  }
  const int64_t reach = max_code(d.activation) * d.activation_widen + heaviest * d.weight_widen;
  int64_t largest = 0;
  bool one_bin = true;
  std::vector<int32_t> bin_of(static_cast<size_t>(d.term_columns), -1);
  for (int64_t b = 0; b < d.bins; ++b) {
    for (int64_t p = 2; p < d.term_columns; ++p) {
      const int64_t term = terms(b, p);
      if (term < 0) fail(LNS_BAD_VALUE, "terms are magnitudes; one is %lld", static_cast<long long>(term));
      if (p <= reach) largest = std::max(largest, term);
      if (!term) continue;
      one_bin = one_bin && bin_of[static_cast<size_t>(p)] == -1;
      bin_of[static_cast<size_t>(p)] = bin_of[static_cast<size_t>(p)] == -1 ? static_cast<int32_t>(b) : -2;
    }
  }
  const bool saturate = d.saturate != 0;
  const int64_t limit = (int64_t{1} << (d.acc_bits - 1)) - 1, step_limit = (int64_t{1} << (d.psum_bits - 1)) - 1;
  const int64_t limit32 = INT32_MAX;
  std::vector<int64_t> bias(static_cast<size_t>(d.channels));
  int64_t largest_bias = 0;
  for (int64_t n = 0; n < d.channels; ++n) {
    /* the start is fitted, like any sum (spec 4.5) */
    const __int128 start = d.bias ? d.bias[n] : 0;
    bias[static_cast<size_t>(n)] = static_cast<int64_t>(fit(start, d.acc_bits, saturate));
    largest_bias = std::max(largest_bias, std::abs(bias[static_cast<size_t>(n)]));
  }
  l.acc_size = 4;
  const auto start32 = [&] {
    if (d.bias) {
      l.start32 =
          per_column<int32_t>(l, 0, [&](int64_t n) { return static_cast<int32_t>(bias[static_cast<size_t>(n)]); });
    }
  };
  /* wrapping sums may be left unfitted to the end if every width divides the integers they are kept in */
  const bool wraps = !saturate && d.psum_bits >= d.acc_bits;
  const bool wraps32 = wraps && d.acc_bits <= 32 && largest <= limit32;
  const bool step32 =
      saturate && largest <= limit32 / d.lanes && limit + std::min(step_limit, largest * d.lanes) <= limit32;
  const bool steps = d.lanes > 1 || largest > step_limit;
  l.limit = static_cast<int32_t>(std::min(limit, limit32));
  l.step_limit = steps ? static_cast<int32_t>(std::min(step_limit, limit32)) : -1;
  /* sums in float64 are exact where no sum, clamped or not yet, reaches 2^53 */
  constexpr double exact = 9.0e15;
  const bool wide_wraps =
      wraps && static_cast<double>(d.depth) * static_cast<double>(largest) + static_cast<double>(largest_bias) < exact;
  const bool wide_steps =
      saturate && static_cast<double>(limit) + static_cast<double>(d.lanes) * static_cast<double>(largest) < exact;
  l.wide_limit = static_cast<double>(limit);
  l.wide_step_limit = steps ? static_cast<double>(step_limit) : -1;
  if (one_bin && d.bins == 1 && (wraps || step32 || wide_steps) && d.constants[0] == 1) {
    const auto start64 = [&] {
      l.acc_size = 8;
      if (d.bias) {
        l.start64 =
            per_column<double>(l, 0, [&](int64_t n) { return static_cast<double>(bias[static_cast<size_t>(n)]); });
      }
    };
    /* by what happens at overflow */
    const auto choose = [&](Kind kind, const Kernel& wrapping, const Kernel& clamped, const Kernel& by_steps,
                            const std::string& name) {
      if (!saturate) return set_kernel(l, kind, wrapping, name + "-wrap");
      if (!steps) return set_kernel(l, kind, clamped, name + "-saturate");
      set_kernel(l, kind, by_steps, name + "-lanes");
    };
    const auto entry = [&](int64_t p) { return static_cast<int32_t>(std::min<int64_t>(terms(0, p), INT32_MAX)); };
    const Structure s = structure_of(d);
    if (!(wraps && make_shifted(l, d, isa.shifted, bias)) && (wraps32 || (step32 && !steps)) && !s.found) {
      make_expanded(l, d, wraps32 ? isa.expanded_wrap : isa.expanded_saturate, bias, entry);
    }
    const int64_t a_top = (max_code(d.activation) * d.activation_widen) >> s.f;
    const int64_t w_top = (max_code(d.weight) * d.weight_widen) >> s.f;
    const bool wide = wide_wraps && !wraps32;
    if (s.found && s.mitchell && (wraps32 || step32) && a_top < 60 && w_top + s.exponent < 60 && s.exponent > -60) {
      choose(Kind::mitchell, isa.mitchell_wrap, isa.mitchell_saturate, isa.mitchell_lanes, "mitchell");
      start32();
      pack_mitchell(l, d, s);
      /* 1 + x is at least 2^x, and an activation's exponent is 64 for what the table has as 0 */
      return bound_terms(l, d, std::ldexp(1.0, s.f), true, 64 - 127);
    }
    if (s.found && s.narrow && (wraps32 || step32 || wide) && a_top < 100 && w_top + a_top / 2 + s.exponent < 100 &&
        s.exponent + a_top / 2 > -100 && s.exponent > -100) {
      if (wide) {
        set_kernel(l, Kind::fp32_wide, isa.fp32_wide, "fp32-wide");
        start64();
      } else {
        choose(Kind::fp32, isa.fp32_wrap, isa.fp32_saturate, isa.fp32_lanes, "fp32");
        start32();
      }
      pack_fp32(l, d, s);
      return bound_terms(l, d, std::ldexp(1.0, s.f), true, -fp32_middle(d, s));
    }
    if ((wraps32 || step32) && d.term_columns < (1 << 28)) {
      choose(Kind::gather, isa.gather_wrap, isa.gather_saturate, isa.gather_lanes, "gather");
      start32();
      pack_codes(l, d, [&](int64_t p) { return static_cast<int32_t>(terms(0, p)); });
      return bound_terms(l, d, 0, false, 0);
    }
    if (s.found && !s.mitchell && (wide_wraps || wide_steps)) {
      choose(Kind::fp64, isa.fp64_wrap, isa.fp64_saturate, isa.fp64_lanes, "fp64");
      start64();
      pack_fp64(l, d, s);
      return bound_terms(l, d, std::ldexp(1.0, s.f), true, 0);
    }
  }
  double combined = 0;
  for (int64_t b = 0; b < d.bins; ++b) combined += std::fabs(static_cast<double>(d.constants[b]));
  if (one_bin && d.bins > 1 && d.bins <= 16 && (wraps32 || step32) && d.depth < (1 << 24) &&
      bins_table_size(d) <= kBinsTable && std::ldexp(combined, d.acc_bits - 1) < 9.0e15) {
    set_kernel(l, Kind::bins, isa.bins, !saturate ? "bins-wrap" : steps ? "bins-lanes" : "bins-saturate");
    start32();
    pack_bins(l, d, bin_of);
    /* what lies between two looks at the sums does not wrap */
    if (largest < limit32 / 8 && limit < limit32 / 4) bound_terms(l, d, 0, false, 0);
    l.bin_block = l.bounded ? l.bound_depth : (256 + l.lanes - 1) / l.lanes * l.lanes;
    return;
  }
  set_kernel(l, Kind::general, Kernel{1, 1, nullptr}, "general");
  l.acc_size = 8;
  l.start_wide = bias;
  l.term_columns = d.term_columns;
  l.bin_of = std::move(bin_of);
  l.terms.resize(static_cast<size_t>(d.bins * d.term_columns));
  for (int64_t b = 0; b < d.bins; ++b) {
    for (int64_t p = 0; p < d.term_columns; ++p) l.terms[static_cast<size_t>(b * d.term_columns + p)] = terms(b, p);
  }
  pack_general(l, d);
}

/* spec 4.4 with any widths */
void run_general(const Tile& t) {
  const Layer& l = *t.layer;
  auto* acc = static_cast<int64_t*>(t.acc);
  const auto* a = static_cast<const int64_t*>(t.a);
  const int64_t columns = t.last_panel - t.first_panel;
  std::vector<int64_t> sums(static_cast<size_t>(l.bins));
  std::vector<__int128> step(static_cast<size_t>(l.bins));
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t channel = t.group * l.columns + t.first_panel + c;
      const int64_t* w = l.weight_longs.data() + channel * l.depth;
      std::fill(sums.begin(), sums.end(), 0);
      sums[0] = l.start_wide[static_cast<size_t>(channel)];
      for (int64_t first = 0; first < l.depth; first += l.lanes) {
        const int64_t last = std::min(first + l.lanes, l.depth);
        std::fill(step.begin(), step.end(), 0);
        for (int64_t k = first; k < last; ++k) {
          const int64_t x = a[r * l.depth + k], y = w[k];
          if (x < 2 || y < 2) continue;
          const int64_t p = (x >> 1) + (y >> 1);
          const int32_t bin = l.bin_of[static_cast<size_t>(p)];
          if (bin == -1) continue;
          const bool minus = ((x ^ y) & 1) != 0;
          for (int64_t b = bin < 0 ? 0 : bin; b < (bin < 0 ? l.bins : bin + 1); ++b) {
            const int64_t term = l.terms[static_cast<size_t>(b * l.term_columns + p)];
            step[static_cast<size_t>(b)] += minus ? -term : term;
          }
        }
        for (size_t b = 0; b < sums.size(); ++b) {
          const __int128 fitted = fit(step[b], l.psum_bits, l.saturate);
          sums[b] = static_cast<int64_t>(fit(static_cast<__int128>(sums[b]) + fitted, l.acc_bits, l.saturate));
        }
      }
      for (size_t b = 0; b < sums.size(); ++b) acc[(r * columns + c) * l.bins + static_cast<int64_t>(b)] = sums[b];
    }
  }
}

/* ---- choosing: log ------------------------------------------------------------------------------------------ */

int64_t nonzero_length(const int32_t* values, int64_t count) {
  while (count && values[count - 1] == 0) --count;
  return count;
}

/* Activations and weights in lanes T; a code there is less by `bias`, but for one side of a product. An activation is
 * its code, repeated to fill 32 bits, and above it twice a mask, plus its sign: the mask leaves nothing of a record's
 * place for a zero. A panel is a record of zeros, and one for each k: codes, their signs, and the opposite signs. */
template <class T>
void pack_narrow(Layer& l, const lns_dot_desc& d) {
  constexpr int64_t bias = sizeof(T) == 1 ? 128 : 32768, most = bias - 1;
  constexpr uint32_t repeated = sizeof(T) == 1 ? 0x01010101 : 0x00010001;
  l.activation_size = 8;
  l.activation_longs = by_word<int64_t>(d.activation, [&](uint32_t code, bool minus) -> int64_t {
    if (!code) return 0;
    const int64_t lane = (static_cast<int64_t>(code * d.activation_widen) << d.guard_bits) - bias;
    const uint32_t lanes = (static_cast<uint32_t>(lane) & static_cast<uint32_t>(2 * bias - 1)) * repeated;
    const uint32_t kept = minus ? ~0u : ~1u;
    return static_cast<int64_t>(static_cast<uint64_t>(kept) << 32 | lanes);
  });
  const int width = l.kernel.panel;
  const int64_t record = 3 * width;
  l.weight_lanes.resize(product(product(l.groups * l.panels, l.depth + 1), record * static_cast<int64_t>(sizeof(T))));
  auto* const lanes = reinterpret_cast<T*>(l.weight_lanes.data());
  const auto zero = static_cast<T>(-bias);
  const auto put = [&](int64_t at, int64_t c, T code, T sign) {
    /* a panel's first record is that of zeros */
    T* const to = lanes + (at + at / l.depth + 1) * record + c;
    to[0] = code;
    to[width] = sign;
    to[2 * width] = static_cast<T>(~sign);
  };
  for (int64_t p = 0; p < l.groups * l.panels; ++p) {
    T* const to = lanes + p * (l.depth + 1) * record;
    std::fill_n(to, width, zero);
    std::fill_n(to + width, 2 * width, T{0});
  }
  pack(
      l, d,
      [&](int64_t at, int64_t c, uint32_t word, int64_t channel) {
        const int64_t code = code_of(word, d.weight);
        const int64_t shifted =
            std::min(std::max(code * d.weight_widen + d.entry_shift[channel], -kMaxDelta), kMaxDelta);
        const int64_t lane = std::min(std::max(shifted * (int64_t{1} << d.guard_bits), -most), most);
        put(at, c, code ? static_cast<T>(lane) : zero, negative(word, d.weight) ? T{-1} : T{0});
      },
      [&](int64_t at, int64_t c) { put(at, c, zero, T{0}); });
}

void make_log(Layer& l, const lns_dot_desc& d, const Isa& isa) {
  const int64_t plus = nonzero_length(d.delta_plus, d.delta_plus_count);
  const int64_t minus = nonzero_length(d.delta_minus, d.delta_minus_count);
  const int64_t largest = (int64_t{1} << d.acc_bits) - 1;
  int64_t largest_delta = 0;
  for (int64_t i = 0; i < plus; ++i)
    largest_delta = std::max<int64_t>(largest_delta, std::abs(int64_t{d.delta_plus[i]}));
  for (int64_t i = 1; i < minus; ++i) {
    largest_delta = std::max<int64_t>(largest_delta, std::abs(int64_t{d.delta_minus[i]}));
  }
  int64_t least_delta = 0;
  for (int64_t i = 0; i < plus; ++i) least_delta = std::min<int64_t>(least_delta, d.delta_plus[i]);
  for (int64_t i = 1; i < minus; ++i) least_delta = std::min<int64_t>(least_delta, d.delta_minus[i]);
  if (least_delta < 0)
    fail(LNS_BAD_VALUE, "delta tables have no negative numbers; one is %lld", static_cast<long long>(least_delta));
  const int64_t a_max = max_code(d.activation) * d.activation_widen, w_max = max_code(d.weight) * d.weight_widen;
  const auto code = [&](int64_t n) { return d.bias ? d.bias[n] & largest : 0; };
  const auto is_minus = [&](int64_t n) { return d.bias && (d.bias[n] >> d.acc_bits) != 0 && code(n) > 0; };
  l.guard_bits = d.guard_bits;
  const auto begin = [&] {
    if (!d.bias) return;
    l.start_code =
        per_column<int32_t>(l, no_code, [&](int64_t n) { return code(n) ? static_cast<int32_t>(code(n)) : no_code; });
    l.start_minus = per_column<int32_t>(l, 0, [&](int64_t n) { return is_minus(n) ? -1 : 0; });
  };
  /* tables with a step have runs of equal entries: one of each run is kept */
  const auto value = [&](int64_t i, bool differ) -> int64_t {
    if (differ) return i < minus ? d.delta_minus[i == 0 ? std::min<int64_t>(1, minus - 1) : i] : 0;
    return i < plus ? d.delta_plus[i] : 0;
  };
  const int64_t length = std::max(plus, minus);
  const auto in_runs = [&](int64_t run) {
    for (int64_t i = 0; i < length + run; ++i) {
      if (i % run && (value(i, false) != value(i - 1, false) || value(i, true) != value(i - 1, true))) return false;
    }
    return true;
  };
  l.delta_shift = 0;
  while (l.delta_shift < 14 && length > (int64_t{1} << l.delta_shift) && in_runs(int64_t{2} << l.delta_shift)) {
    ++l.delta_shift;
  }
  const int shift = l.delta_shift;
  l.delta_size = std::max((length + (int64_t{1} << shift) - 1) >> shift, int64_t{1}) + 1;
  const bool fits32 = d.acc_bits <= 26 && largest_delta <= kMaxDelta && a_max < (1 << 26) && w_max < (1 << 26);
  if (fits32) {
    l.largest = static_cast<int32_t>(largest);
    l.delta.resize(2 * l.delta_size);
    for (int64_t i = 0; i < l.delta_size; ++i) {
      l.delta[i] = static_cast<int32_t>(value(i << shift, false));
      l.delta[l.delta_size + i] = i == 0 && shift == 0 ? -(1 << 28) : static_cast<int32_t>(-value(i << shift, true));
    }
  }
  if (fits32 && isa.has_log8 && d.acc_bits <= 7 && d.guard_bits == 0 && d.lanes == 1 && plus < 64 && minus < 64 &&
      largest_delta <= 127 && a_max <= 127) {
    set_kernel(l, Kind::log8, isa.log8, "log8");
    begin();
    l.acc_size = 2;
    l.activation_size = 8;
    l.delta_shift = 0;
    for (int64_t i = 0; i < 64; ++i) {
      l.delta8[0][i] = static_cast<int8_t>(i < plus ? d.delta_plus[i] : 0);
      l.delta8[1][i] = static_cast<int8_t>(i == 0 ? -128 : i < minus ? -d.delta_minus[i] : 0);
    }
    l.delta_used = std::max(plus, minus);
    return pack_narrow<int8_t>(l, d);
  }
  const int guard = d.guard_bits;
  /* no two codes are further apart than INT16_MAX */
  const int64_t size16 = std::min<int64_t>(l.delta_size, (INT16_MAX >> shift) + 2);
  if (fits32 && isa.has_log16 && d.acc_bits <= 15 && d.lanes == 1 && size16 <= INT16_MAX &&
      largest_delta <= INT16_MAX && (a_max << guard) <= INT16_MAX) {
    if (size16 <= 64) {
      set_kernel(l, Kind::log16, isa.log16, "log16");
    } else {
      set_kernel(l, Kind::log16, isa.log16_gather, "log16-gather");
    }
    begin();
    l.acc_size = 4;
    l.activation_size = 8;
    l.delta_used = size16;
    l.delta_size = std::max<int64_t>(size16, 64);
    l.delta16_memory.resize(2 * l.delta_size + 2);
    std::fill(l.delta16_memory.data(), l.delta16_memory.data() + l.delta16_memory.size(), int16_t{0});
    int16_t* const made = l.delta16_memory.data() + 1;
    for (int64_t i = 0; i + 1 < size16; ++i) {
      made[i] = static_cast<int16_t>(value(i << shift, false));
      made[l.delta_size + i] = i == 0 && shift == 0 ? INT16_MIN : static_cast<int16_t>(-value(i << shift, true));
    }
    l.delta16 = made;
    return pack_narrow<int16_t>(l, d);
  }
  if (fits32) {
    set_kernel(l, Kind::log32, isa.log32, "log32");
    begin();
    l.acc_size = 8;
    l.activation_size = 8;
    l.activation_ints.resize(size_t{2} << d.activation.bits);
    for (uint32_t word = 0; word < (1u << d.activation.bits); ++word) {
      const uint32_t c = code_of(word, d.activation);
      l.activation_ints[2 * word] = c ? static_cast<int32_t>(c * d.activation_widen) : -(1 << 28);
      l.activation_ints[2 * word + 1] = negative(word, d.activation) ? -1 : 0;
    }
    const int64_t far = kMaxDelta;
    l.weight_ints.resize(2 * packed_size(l));
    const int width = l.kernel.panel;
    pack(
        l, d,
        [&](int64_t at, int64_t c, uint32_t word, int64_t channel) {
          const int64_t w = code_of(word, d.weight);
          const int64_t shifted = w * d.weight_widen + d.entry_shift[channel];
          l.weight_ints[2 * at * width + c] =
              static_cast<int32_t>(w ? std::min(std::max(shifted, -far), far) : -(1 << 28));
          l.weight_ints[(2 * at + 1) * width + c] = negative(word, d.weight) ? -1 : 0;
        },
        [&](int64_t at, int64_t c) {
          l.weight_ints[2 * at * width + c] = -(1 << 28), l.weight_ints[(2 * at + 1) * width + c] = 0;
        });
    return;
  }
  set_kernel(l, Kind::log_general, Kernel{1, 1, nullptr}, "log-general");
  l.acc_size = 16;
  l.entry_shift.assign(d.entry_shift, d.entry_shift + d.channels);
  l.delta_size = length + 1;
  l.terms.resize(static_cast<size_t>(2 * l.delta_size));
  for (int64_t i = 0; i < l.delta_size; ++i) {
    l.terms[static_cast<size_t>(i)] = value(i, false);
    l.terms[static_cast<size_t>(l.delta_size + i)] = value(i, true);
  }
  l.start_wide.resize(static_cast<size_t>(d.channels));
  for (int64_t n = 0; n < d.channels; ++n) l.start_wide[static_cast<size_t>(n)] = 2 * code(n) + is_minus(n);
  pack_general(l, d);
}

/* spec 5 in 64 bits; a signed code is twice the code, plus the sign */
void run_log_general(const Tile& t) {
  const Layer& l = *t.layer;
  auto* acc = static_cast<int64_t*>(t.acc);
  const auto* a = static_cast<const int64_t*>(t.a);
  const int64_t columns = t.last_panel - t.first_panel, largest = (int64_t{1} << l.acc_bits) - 1;
  const auto add = [&](int64_t x, int64_t y) -> int64_t {
    const int64_t big = std::max(x >> 1, y >> 1), small = std::min(x >> 1, y >> 1);
    const int64_t sign = (x >> 1) >= (y >> 1) ? x & 1 : y & 1;
    if (small == 0) return big ? 2 * big + sign : 0;
    const bool differ = ((x ^ y) & 1) != 0;
    const int64_t distance = big - small, at = std::min(distance, l.delta_size - 1);
    if (differ && distance == 0) return 0;
    const int64_t total =
        differ ? big - l.terms[static_cast<size_t>(l.delta_size + at)] : big + l.terms[static_cast<size_t>(at)];
    return total < 1 ? 0 : 2 * std::min(total, largest) + sign;
  };
  std::vector<int64_t> level(static_cast<size_t>(l.lanes));
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t channel = t.group * l.columns + t.first_panel + c;
      const int64_t* w = l.weight_longs.data() + channel * l.depth;
      const int64_t shift = l.entry_shift[static_cast<size_t>(channel)];
      int64_t sum = l.start_wide[static_cast<size_t>(channel)];
      for (int64_t first = 0; first < l.depth; first += l.lanes) {
        size_t count = static_cast<size_t>(std::min<int64_t>(l.lanes, l.depth - first));
        for (size_t j = 0; j < count; ++j) {
          const int64_t x = a[r * l.depth + first + static_cast<int64_t>(j)], y = w[first + static_cast<int64_t>(j)];
          const int64_t code = (x >> 1) + (y >> 1) + shift;
          int64_t entry = 0;
          if (x >= 2 && y >= 2 && code >= 1) {
            entry = 2 * (code > largest ? largest : std::min(code << l.guard_bits, largest)) + ((x ^ y) & 1);
          }
          level[j] = entry;
        }
        while (count > 1) {
          for (size_t j = 0; j < count / 2; ++j) level[j] = add(level[2 * j], level[2 * j + 1]);
          if (count % 2) level[count / 2] = level[count - 1];
          count = (count + 1) / 2;
        }
        sum = add(sum, level[0]);
      }
      acc[2 * (r * columns + c)] = sum >> 1;
      acc[2 * (r * columns + c) + 1] = -(sum & 1);
    }
  }
}

/* ---- results --------------------------------------------------------------------------------------------- */

/* One word of the kinds whose accumulators are not of 32 bits. */
uint32_t wide_word(const Tile& t, int64_t r, int64_t c, lns_counts& counts) {
  const Layer& l = *t.layer;
  const int64_t columns = (t.last_panel - t.first_panel) * t.panel, at = r * columns + c;
  const int64_t shift = l.code_shift[static_cast<size_t>(t.group * l.columns + t.first_panel * t.panel + c)];
  if (l.kind == Kind::log_general) {
    const auto* acc = static_cast<const int64_t*>(t.acc) + 2 * at;
    const bool zero = acc[0] < 1;
    const int64_t half = (int64_t{1} << l.guard_bits) >> 1;
    return l.output.word(zero ? 0 : ((acc[0] + half) >> l.guard_bits) + shift, acc[1] != 0 && !zero, zero, counts);
  }
  uint64_t sum = 0;
  if (l.kind == Kind::fp32_wide || l.kind == Kind::fp64) {
    const auto value = static_cast<int64_t>(static_cast<const double*>(t.acc)[at]);
    sum = static_cast<uint64_t>(fit(value, l.acc_bits, false)) * static_cast<uint64_t>(l.constants[0]);
  } else {
    const auto* bins = static_cast<const int64_t*>(t.acc) + at * l.bins;
    for (int64_t b = 0; b < l.bins; ++b) {
      sum += static_cast<uint64_t>(l.constants[static_cast<size_t>(b)]) * static_cast<uint64_t>(bins[b]);
    }
  }
  const bool minus = static_cast<int64_t>(sum) < 0;
  const uint64_t magnitude = minus ? 0 - sum : sum;
  return l.output.word(magnitude ? l.raw(magnitude) + shift : 0, minus, magnitude == 0, counts);
}

/* The words of a tile: store(words [rows, row_words], first row, rows, first channel, channels). */
template <class Store>
void finish(const Tile& t, int64_t rows, lns_counts& counts, Store store) {
  const Layer& l = *t.layer;
  const int64_t first = t.first_panel * t.panel;
  const int64_t real = std::min((t.last_panel - t.first_panel) * t.panel, l.columns - first);
  const bool wide = !t.low && (l.kind == Kind::general || l.kind == Kind::log_general || l.kind == Kind::fp32_wide ||
                               l.kind == Kind::fp64);
  counts.total += rows * real;
  alignas(64) int32_t words[kRowTile * row_words];
  for (int64_t r = 0; r < rows; r += kRowTile) {
    const int64_t height = std::min(kRowTile, rows - r);
    for (int64_t c = 0; c < real; c += row_words) {
      const int64_t columns = std::min(row_words, real - c);
      if (wide) {
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            words[i * row_words + j] = static_cast<int32_t>(wide_word(t, r + i, c + j, counts));
          }
        }
      } else {
        l.isa->words(t, r, height, c, columns, words, counts);
      }
      store(words, r, height, t.group * l.columns + first + c, columns);
    }
  }
}

/* Memory that a thread keeps from tile to tile. */
struct Scratch {
  Buffer<char> a, acc, words, sums, terms, counts, lacking;
  static char* at_least(Buffer<char>& buffer, int64_t size) {
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
  }
};
thread_local Scratch scratch;

/* Packed activations, whatever they are packed as: fill(put) calls put(row, k, word). */
template <class Fill>
void pack_rows(const Layer& l, void* packed, Fill fill) {
  const int64_t depth = l.depth;
  switch (l.kind) {
    case Kind::fp32:
    case Kind::fp32_wide: {
      auto* to = static_cast<float*>(packed);
      const float* from = l.activation_floats.data();
      return fill([=](int64_t r, int64_t k, uint32_t word) { to[r * depth + k] = from[word]; });
    }
    case Kind::fp64: {
      auto* to = static_cast<double*>(packed);
      const double* from = l.activation_doubles.data();
      return fill([=](int64_t r, int64_t k, uint32_t word) { to[r * depth + k] = from[word]; });
    }
    case Kind::mitchell:
    case Kind::gather: {
      auto* to = static_cast<int32_t*>(packed);
      const int32_t* from = l.activation_ints.data();
      return fill([=](int64_t r, int64_t k, uint32_t word) { to[r * depth + k] = from[word]; });
    }
    case Kind::log32: {
      auto* to = static_cast<int64_t*>(packed);
      const auto* from = l.activation_ints.data();
      return fill([=](int64_t r, int64_t k, uint32_t word) { std::memcpy(to + r * depth + k, from + 2 * word, 8); });
    }
    case Kind::log8:
    case Kind::log16:
    case Kind::bins:
    case Kind::general:
    case Kind::log_general: {
      auto* to = static_cast<int64_t*>(packed);
      const int64_t* from = l.activation_longs.data();
      return fill([=](int64_t r, int64_t k, uint32_t word) { to[r * depth + k] = from[word]; });
    }
  }
}

void compute(const Tile& t) {
  switch (t.layer->kind) {
    case Kind::general:
      return run_general(t);
    case Kind::log_general:
      return run_log_general(t);
    default:
      return t.layer->kernel.run(t);
  }
}

/* All rows of all groups: fill(group, first row, rows, put) packs, store(group … ) takes words. */
template <class Fill, class Store>
void run_expanded(const Layer& l, int64_t rows, int threads, lns_counts* counts, Fill fill, Store store) {
  /* tasks of equal size, a few for each thread where there are enough rows */
  const int64_t at_most = std::min(kExpandedTile, kExpandedBytes / (4 * (l.depth + 8)));
  const int64_t most = std::max(kExpandedRows, std::min(at_most, (rows + threads - 1) / threads));
  const int64_t row_tiles = (rows + most - 1) / most, tile_rows = (rows + row_tiles - 1) / row_tiles;
  constexpr int64_t depth_of_block = expanded_depth;
  const int64_t blocks = (l.depth + depth_of_block - 1) / depth_of_block;
  std::mutex mutex;
  parallel(row_tiles * l.groups, threads, [&](int64_t task) {
    const int64_t group = task % l.groups, first = task / l.groups * tile_rows;
    const int64_t real = std::min(tile_rows, rows - first);
    const int64_t bytes = product(product(blocks, real), depth_of_block * 2);
    auto* packed = reinterpret_cast<uint16_t*>(Scratch::at_least(scratch.a, std::max<int64_t>(bytes, 64)));
    std::array<bool, 256> seen{};
    bool* const met = seen.data();
    const uint16_t* from = l.activation_rows.data();
    for (int64_t k = l.depth; k < blocks * depth_of_block; ++k) {
      for (int64_t r = 0; r < real; ++r) packed[((blocks - 1) * real + r) * depth_of_block + k % depth_of_block] = 0;
    }
    fill(group, first, real, [=](int64_t r, int64_t k, uint32_t word) {
      met[word] = true;
      packed[(k / depth_of_block * real + r) * depth_of_block + k % depth_of_block] = from[word];
    });
    int64_t least = expanded_codes, largest = 0;
    for (uint32_t word = 0; word < (1u << l.activation.bits); ++word) {
      const int64_t code = code_of(word, l.activation) * l.activation_widen;
      if (!met[word] || !code) continue;
      least = std::min(least, code);
      largest = std::max(largest, code);
    }
    auto* acc = Scratch::at_least(scratch.acc, product(real, l.expanded.panel) * 4);
    auto* terms = reinterpret_cast<int32_t*>(Scratch::at_least(scratch.terms, terms_bytes));
    lns_counts found = {0, 0, 0, 0};
    for (int64_t p = 0; p < l.expanded_panels; ++p) {
      Tile t = {&l, group, p, p + 1, real, packed, acc};
      t.least_code = std::min(least, largest);
      t.largest_code = largest;
      t.panel = l.expanded.panel;
      t.terms = terms;
      l.expanded.run(t);
      finish(t, real, found, [&](const int32_t* words, int64_t r, int64_t height, int64_t channel, int64_t columns) {
        store(words, first + r, height, channel, columns);
      });
    }
    add_to(counts, found, mutex);
  });
}

/* Rows of a task of shifted terms, and bytes of its activations, at most. */
constexpr int64_t kShiftedTile = 512, kShiftedBytes = int64_t{1} << 23;
/* Bytes of the terms of a block that stay in the first-level cache, about. */
constexpr int64_t kShiftedTerms = int64_t{1} << 14;

/* The activations of every row that are not zero, block by block; those of low octaves from a block's end on. */
template <bool kLow>
void pack_shifted(const Layer& l, const uint8_t* words, int64_t stride, const Tile& t, ShiftedEntry* to,
                  uint8_t* filled) {
  const ShiftedEntry* from = l.activation_shifts.data();
  const uint8_t* low = l.activation_low.data();
  const int64_t step = t.block_depth;
  const auto size = static_cast<uint32_t>(l.gamma * l.expanded.panel * 4 * (t.both_signs ? 2 : 1));
  for (int64_t first = 0; first < l.depth; first += step) {
    const int64_t count = std::min(step, l.depth - first);
    for (int64_t r = 0; r < t.rows; ++r, to += step) {
      const uint8_t* const at = words + r * stride + first;
      int64_t high_count = 0, low_count = 0;
      uint32_t row = 0;
      for (int64_t k = 0; k < count; ++k, row += size) {
        ShiftedEntry e = from[at[k]];
        const bool used = e.shift != UINT32_MAX, is_low = kLow && low[at[k]];
        e.row += row;
        to[high_count] = e;
        if (kLow) to[step - 1 - low_count] = e;
        high_count += used && !is_low;
        low_count += is_low;
      }
      *filled++ = static_cast<uint8_t>(high_count);
      *filled++ = static_cast<uint8_t>(low_count);
    }
  }
}

template <class Fill, class Store>
void run_shifted(const Layer& l, int64_t rows, int threads, lns_counts* counts, Fill fill, Store store) {
  const int64_t at_most = std::min(kShiftedTile, kShiftedBytes / (8 * (l.depth + shifted_depth)));
  const int64_t most = std::max(l.isa->shifted_rows, std::min(at_most, (rows + threads - 1) / threads));
  const int64_t row_tiles = (rows + most - 1) / most, tile_rows = (rows + row_tiles - 1) / row_tiles;
  const int64_t panel = l.expanded.panel;
  std::mutex mutex;
  parallel(row_tiles * l.groups, threads, [&](int64_t task) {
    const int64_t group = task % l.groups, first = task / l.groups * tile_rows;
    const int64_t real = std::min(tile_rows, rows - first);
    /* an odd number of cache lines: what lies one below the other is not kept in the same places */
    const int64_t depth = l.depth, stride = (depth / 64 | 1) * 64 + (depth / 64 % 2 && depth % 64 ? 128 : 0);
    auto* words = reinterpret_cast<uint8_t*>(Scratch::at_least(scratch.words, product(real, stride)));
    fill(group, first, real,
         [=](int64_t r, int64_t k, uint32_t word) { words[r * stride + k] = static_cast<uint8_t>(word); });
    Tile t = {&l, group, 0, 1, real, nullptr, nullptr};
    if (l.activation.is_signed) {
      const auto sign = static_cast<uint8_t>(1u << (l.activation.bits - 1));
      uint8_t some = 0;
      for (int64_t r = 0; r < real; ++r) {
        for (int64_t k = 0; k < depth; ++k) some |= words[r * stride + k] > sign;
      }
      t.both_signs = some != 0;
    }
    t.block_depth = shifted_depth;
    while (t.block_depth > 4 && t.block_depth * l.gamma * panel * (t.both_signs ? 8 : 4) > kShiftedTerms) {
      t.block_depth /= 2;
    }
    const int64_t blocks = (depth + t.block_depth - 1) / t.block_depth, cells = product(blocks, real);
    auto* entries = reinterpret_cast<ShiftedEntry*>(
        Scratch::at_least(scratch.a, product(cells, t.block_depth * static_cast<int64_t>(sizeof(ShiftedEntry))) + 64));
    auto* filled = reinterpret_cast<uint8_t*>(Scratch::at_least(scratch.counts, product(cells, 2) + 64));
    if (l.unit) {
      pack_shifted<true>(l, words, stride, t, entries, filled);
    } else {
      pack_shifted<false>(l, words, stride, t, entries, filled);
    }
    t.entries = entries;
    t.filled = filled;
    const int64_t sums = product(real, panel);
    t.acc = Scratch::at_least(scratch.acc, sums * 4);
    if (l.unit) t.low = reinterpret_cast<int32_t*>(Scratch::at_least(scratch.sums, sums * 4));
    t.lacking = reinterpret_cast<uint8_t*>(Scratch::at_least(scratch.lacking, sums));
    t.panel = l.expanded.panel;
    t.terms = reinterpret_cast<int32_t*>(Scratch::at_least(scratch.terms, terms_bytes + 2 * shifted_depth * panel));
    lns_counts found = {0, 0, 0, 0};
    for (int64_t p = 0; p < l.expanded_panels; ++p) {
      t.first_panel = p;
      t.last_panel = p + 1;
      l.expanded.run(t);
      finish(t, real, found, [&](const int32_t* made, int64_t r, int64_t height, int64_t channel, int64_t columns) {
        store(made, first + r, height, channel, columns);
      });
    }
    add_to(counts, found, mutex);
  });
}

template <class Fill, class Store>
void run_rows(const Layer& l, int64_t rows, int threads, lns_counts* counts, Fill fill, Store store) {
  if (rows == 0 || l.columns == 0) return;
  if (l.shifts && rows >= l.isa->shifted_rows && l.depth && l.depth < (1 << 20)) {
    return run_shifted(l, rows, threads, counts, fill, store);
  }
  /* with fewer rows than that for every other thread, tiles of few rows keep all threads busy */
  if (l.expands && !l.shifts && rows * l.groups >= kExpandedRows * ((threads + 1) / 2) && rows >= kExpandedRows &&
      l.depth < (1 << 20)) {
    return run_expanded(l, rows, threads, counts, fill, store);
  }
  const int step = l.kernel.row_step;
  const int64_t row_tiles = (rows + kRowTile - 1) / kRowTile;
  const int64_t column_bytes = l.kernel.panel * l.bin_stride * std::max(l.acc_size, 1) * kRowTile;
  const int64_t chunk = std::max<int64_t>(1, kAccBytes / std::max<int64_t>(column_bytes, 1));
  /* few rows: columns are shared out too */
  int64_t shares = 1;
  if (row_tiles * l.groups < 2 * threads) {
    shares = std::min<int64_t>((l.panels + 3) / 4, (2 * threads + row_tiles * l.groups - 1) / (row_tiles * l.groups));
    shares = std::max<int64_t>(shares, 1);
  }
  std::mutex mutex;
  parallel(row_tiles * l.groups * shares, threads, [&](int64_t task) {
    const int64_t share = task % shares, group = task / shares % l.groups, tile = task / shares / l.groups;
    const int64_t first = tile * kRowTile, real = std::min(kRowTile, rows - first);
    const int64_t padded = (real + step - 1) / step * step;
    const int64_t row_bytes = product(l.depth, l.activation_size);
    char* a = Scratch::at_least(scratch.a, std::max<int64_t>(product(padded, row_bytes), 64));
    pack_rows(l, a, [&](auto put) {
      fill(group, first, real, put);
      for (int64_t r = real; r < padded; ++r) {
        for (int64_t k = 0; k < l.depth; ++k) put(r, k, 0);
      }
    });
    const float* row_sums = nullptr;
    if (l.bounded) {
      const int64_t blocks = (l.depth + l.bound_depth - 1) / l.bound_depth;
      auto* sums = reinterpret_cast<float*>(Scratch::at_least(scratch.sums, product(padded * blocks, 4)));
      sum_bounds(l, a, padded, sums);
      row_sums = sums;
    }
    const int32_t* entry_counts = nullptr;
    if (l.kind == Kind::bins) {
      const int64_t blocks = (l.depth + l.bin_block - 1) / l.bin_block;
      auto* counted = reinterpret_cast<int32_t*>(Scratch::at_least(scratch.counts, product(padded * blocks, 4) + 4));
      bin_entries(l, reinterpret_cast<uint64_t*>(a), padded, counted);
      entry_counts = counted;
    }
    char* acc = Scratch::at_least(scratch.acc, chunk * column_bytes);
    const int64_t begin = l.panels * share / shares, end = l.panels * (share + 1) / shares;
    lns_counts found = {0, 0, 0, 0};
    for (int64_t p = begin; p < end; p += chunk) {
      Tile t = {&l, group, p, std::min(p + chunk, end), padded, a, acc};
      t.panel = l.kernel.panel;
      t.row_sums = row_sums;
      t.entry_counts = entry_counts;
      compute(t);
      finish(t, real, found, [&](const int32_t* words, int64_t r, int64_t height, int64_t channel, int64_t columns) {
        store(words, first + r, height, channel, columns);
      });
    }
    add_to(counts, found, mutex);
  });
}

/* Some words, `step` apart, to consecutive places. */
void store_words(const Output& out, void* y, int64_t at, const int32_t* words, int64_t step, int64_t count) {
  if (out.bytes == 1) {
    auto* to = static_cast<uint8_t*>(y) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(words[i * step]);
  } else {
    auto* to = static_cast<uint16_t*>(y) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(words[i * step]);
  }
}

template <class Word>
void run_matrix(const Layer& l, const Word* x, int64_t rows, int64_t row_stride, int64_t column_stride, void* y,
                int threads, lns_counts* counts) {
  const uint32_t mask = (1u << l.activation.bits) - 1;
  run_rows(
      l, rows, threads, counts,
      [&](int64_t, int64_t first, int64_t count, auto put) {
        for (int64_t r = 0; r < count; ++r) {
          const Word* row = x + (first + r) * row_stride;
          if (column_stride == 1) {
            for (int64_t k = 0; k < l.depth; ++k) put(r, k, row[k] & mask);
          } else {
            for (int64_t k = 0; k < l.depth; ++k) put(r, k, row[k * column_stride] & mask);
          }
        }
      },
      [&](const int32_t* words, int64_t row, int64_t height, int64_t channel, int64_t columns) {
        for (int64_t r = 0; r < height; ++r) {
          store_words(l.output, y, (row + r) * l.columns + channel, words + r * row_words, 1, columns);
        }
      });
}

struct Geometry {
  int64_t size[3], out[3], plane, positions, taps, channels; /* channels: of a group's input */
  lns_window w;
};

template <class Word>
void run_convolution(const Layer& l, const Geometry& g, const Word* x, int64_t batch, void* y, int threads,
                     lns_counts* counts) {
  const uint32_t mask = (1u << l.activation.bits) - 1;
  /* where each tap lies, from the window's first */
  std::vector<int64_t> taps(static_cast<size_t>(g.taps)), offsets(static_cast<size_t>(l.depth));
  std::vector<std::array<int64_t, 3>> steps(static_cast<size_t>(g.taps));
  for (int64_t i = 0; i < g.taps; ++i) {
    const int64_t at[3] = {i / (g.w.kernel[1] * g.w.kernel[2]), i / g.w.kernel[2] % g.w.kernel[1], i % g.w.kernel[2]};
    auto& step = steps[static_cast<size_t>(i)];
    for (size_t j = 0; j < 3; ++j) step[j] = at[j] * g.w.dilations[j];
    taps[static_cast<size_t>(i)] = (step[0] * g.size[1] + step[1]) * g.size[2] + step[2];
  }
  for (int64_t k = 0; k < l.depth; ++k) {
    offsets[static_cast<size_t>(k)] = k / g.taps * g.plane + taps[static_cast<size_t>(k % g.taps)];
  }
  const auto& far = steps.back();
  run_rows(
      l, product(batch, g.positions), threads, counts,
      [&](int64_t group, int64_t first, int64_t count, auto put) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t row = first + r, position = row % g.positions;
          const int64_t at[3] = {position / (g.out[1] * g.out[2]), position / g.out[2] % g.out[1], position % g.out[2]};
          int64_t corner[3];
          bool inside = true;
          for (size_t j = 0; j < 3; ++j) {
            corner[j] = at[j] * g.w.strides[j] - g.w.pads[j];
            inside = inside && corner[j] >= 0 && corner[j] + far[j] < g.size[j];
          }
          const Word* image = x + ((row / g.positions) * l.groups + group) * g.channels * g.plane;
          const int64_t base = (corner[0] * g.size[1] + corner[1]) * g.size[2] + corner[2];
          if (inside) {
            for (int64_t k = 0; k < l.depth; ++k) put(r, k, image[base + offsets[static_cast<size_t>(k)]] & mask);
            continue;
          }
          for (int64_t i = 0; i < g.taps; ++i) {
            const auto& step = steps[static_cast<size_t>(i)];
            bool valid = true;
            for (size_t j = 0; j < 3; ++j) {
              const int64_t where = corner[j] + step[j];
              valid = valid && where >= 0 && where < g.size[j];
            }
            const int64_t from = base + taps[static_cast<size_t>(i)];
            for (int64_t c = 0; c < g.channels; ++c)
              put(r, c * g.taps + i, valid ? image[from + c * g.plane] & mask : 0);
          }
        }
      },
      [&](const int32_t* words, int64_t row, int64_t height, int64_t channel, int64_t columns) {
        /* rows of one image lie together */
        for (int64_t r = 0; r < height;) {
          const int64_t image = (row + r) / g.positions, position = (row + r) % g.positions;
          const int64_t count = std::min(height - r, g.positions - position);
          for (int64_t c = 0; c < columns; ++c) {
            const int64_t at = (image * l.groups * l.columns + channel + c) * g.positions + position;
            store_words(l.output, y, at, words + r * row_words + c, row_words, count);
          }
          r += count;
        }
      });
}

}  // namespace
}  // namespace lns

using namespace lns;

int32_t lns_dot_create(const lns_dot_desc* desc, lns_dot** out, lns_error* error) {
  return guarded(error, [&] {
    need(desc, "desc");
    need(out, "out");
    *out = nullptr;
    check(*desc);
    auto made = std::make_unique<lns_dot>(desc->output);
    Layer& l = made->layer;
    l.activation = desc->activation;
    l.weight = desc->weight;
    l.activation_widen = desc->activation_widen;
    l.weight_widen = desc->weight_widen;
    l.groups = desc->groups;
    l.columns = desc->channels / desc->groups;
    l.depth = desc->depth;
    l.lanes = desc->lanes;
    l.acc_bits = desc->acc_bits;
    l.psum_bits = desc->log ? 0 : desc->psum_bits;
    l.saturate = !desc->log && desc->saturate;
    l.guard_bits = 0;
    l.bins = l.bin_stride = desc->log ? 1 : desc->bins;
    if (desc->channels) l.code_shift.assign(desc->code_shift, desc->code_shift + desc->channels);
    /* beyond these everything saturates, or nothing is left; vectors may read past the last channel */
    l.code_shift32.assign(static_cast<size_t>(desc->channels + row_words), 0);
    for (int64_t n = 0; n < desc->channels; ++n) {
      constexpr int64_t far = int64_t{1} << 29;
      l.code_shift32[static_cast<size_t>(n)] = static_cast<int32_t>(std::min(std::max(desc->code_shift[n], -far), far));
    }
    const Isa& isa = current_isa();
    l.isa = &isa;
    if (desc->log) {
      make_log(l, *desc, isa);
    } else {
      make_linear(l, *desc, isa);
    }
    l.kernel_name += std::string(" ") + isa.name;
    *out = made.release();
  });
}

void lns_dot_destroy(lns_dot* dot) { delete dot; }

const char* lns_dot_kernel(const lns_dot* dot) { return dot ? dot->layer.kernel_name.c_str() : ""; }

int32_t lns_dot_run(const lns_dot* dot, const void* activations, int64_t rows, int64_t row_stride,
                    int64_t column_stride, void* output, int32_t threads, lns_counts* counts, lns_error* error) {
  return guarded(error, [&] {
    need(dot, "dot");
    const Layer& l = dot->layer;
    if (l.groups != 1)
      fail(LNS_BAD_VALUE, "a layer with %lld groups is a convolution", static_cast<long long>(l.groups));
    need_range(rows, 0, int64_t{1} << 40, "rows");
    if (product(rows, l.depth)) need(activations, "activations");
    if (product(rows, l.columns)) need(output, "output");
    if (bytes_of(l.activation) == 1) {
      run_matrix(l, static_cast<const uint8_t*>(activations), rows, row_stride, column_stride, output, threads, counts);
    } else {
      run_matrix(l, static_cast<const uint16_t*>(activations), rows, row_stride, column_stride, output, threads,
                 counts);
    }
  });
}

int32_t lns_conv_run(const lns_dot* dot, const lns_window* window, const void* x, int64_t batch, const int64_t* size,
                     void* y, int32_t threads, lns_counts* counts, lns_error* error) {
  return guarded(error, [&] {
    need(dot, "dot");
    need(window, "window");
    need(size, "size");
    const Layer& l = dot->layer;
    Geometry g;
    g.w = *window;
    window_output(*window, size, g.out);
    g.plane = g.positions = g.taps = 1;
    for (size_t j = 0; j < 3; ++j) {
      g.size[j] = size[j];
      g.plane = product(g.plane, size[j]);
      g.positions = product(g.positions, g.out[j]);
      g.taps = product(g.taps, window->kernel[j]);
    }
    if (l.depth % g.taps) {
      fail(LNS_BAD_VALUE, "a depth of %lld is no multiple of the kernel's %lld positions",
           static_cast<long long>(l.depth), static_cast<long long>(g.taps));
    }
    g.channels = l.depth / g.taps;
    need_range(batch, 0, int64_t{1} << 40, "batch");
    if (product(product(batch, product(l.groups, g.channels)), g.plane)) need(x, "x");
    if (product(product(batch, product(l.groups, l.columns)), g.positions)) need(y, "y");
    if (batch == 0) return;
    if (bytes_of(l.activation) == 1) {
      run_convolution(l, g, static_cast<const uint8_t*>(x), batch, y, threads, counts);
    } else {
      run_convolution(l, g, static_cast<const uint16_t*>(x), batch, y, threads, counts);
    }
  });
}
