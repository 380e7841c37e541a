/* Operations other than dot products: encoding, decoding, and those of spec 6. */
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>

#include "internal.h"

namespace lns {

void window_output(const lns_window& w, const int64_t* input, int64_t* output) {
  constexpr int64_t most = int64_t{1} << 32;
  for (size_t j = 0; j < 3; ++j) {
    const int64_t begin = w.pads[j], end = w.pads[3 + j];
    if (w.kernel[j] < 1 || w.kernel[j] > most || w.strides[j] < 1 || w.strides[j] > most || w.dilations[j] < 1 ||
        w.dilations[j] > most || begin < 0 || begin > most || end < 0 || end > most) {
      fail(LNS_BAD_VALUE, "a window's kernel, strides and dilations are at least 1, its pads at least 0");
    }
    if (input[j] < 0 || input[j] > most) fail(LNS_BAD_VALUE, "an axis of %lld", static_cast<long long>(input[j]));
    const __int128 reach = static_cast<__int128>(w.dilations[j]) * (w.kernel[j] - 1) + 1;
    const __int128 room = static_cast<__int128>(input[j]) + begin + end - reach;
    if (room < 0) {
      fail(LNS_BAD_VALUE, "a window of %lld (dilation %lld) does not fit an axis of %lld with pads %lld and %lld",
           static_cast<long long>(w.kernel[j]), static_cast<long long>(w.dilations[j]),
           static_cast<long long>(input[j]), static_cast<long long>(begin), static_cast<long long>(end));
    }
    output[j] = static_cast<int64_t>(room / w.strides[j]) + 1;
  }
}

namespace {

void need(const void* pointer, const char* what) {
  if (!pointer) fail(LNS_BAD_VALUE, "%s is missing", what);
}

/* Blocks of elements large enough to be worth a thread. */
void blocks(int64_t count, int threads, int64_t size, const std::function<void(int64_t, int64_t)>& body) {
  if (count < 0) fail(LNS_BAD_VALUE, "a count of %lld", static_cast<long long>(count));
  const int64_t tasks = (count + size - 1) / size;
  parallel(tasks, threads, [&](int64_t i) { body(i * size, std::min(count, (i + 1) * size)); });
}
constexpr int64_t kBlock = 1 << 14;
/* Sums of narrow words from which on it pays to add every pair of words once. */
constexpr int64_t kPairs = 1 << 17;

/* A word for every word: a table is filled once and read for each element. */
template <class Map>
void map_words(const void* x, int64_t count, lns_format from, void* y, int bytes_out, int threads, Map map) {
  if (count) need(x, "x"), need(y, "y");
  const size_t words = size_t{1} << from.bits;
  std::vector<uint16_t> table(words);
  for (uint32_t w = 0; w < words; ++w) table[w] = static_cast<uint16_t>(map(w));
  const uint32_t mask = static_cast<uint32_t>(words - 1);
  const int bytes_in = bytes_of(from);
  const auto run = [&](const auto* in, auto* out) {
    blocks(count, threads, kBlock, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        out[i] = static_cast<std::remove_reference_t<decltype(*out)>>(table[in[i] & mask]);
      }
    });
  };
  if (bytes_in == 1 && bytes_out == 1) return run(static_cast<const uint8_t*>(x), static_cast<uint8_t*>(y));
  if (bytes_in == 1) return run(static_cast<const uint8_t*>(x), static_cast<uint16_t*>(y));
  if (bytes_out == 1) return run(static_cast<const uint16_t*>(x), static_cast<uint8_t*>(y));
  return run(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
}

/* Order by value: negative words below zero (spec 6.1). */
int32_t key_of(uint32_t word, lns_format f) {
  const auto code = static_cast<int32_t>(code_of(word, f));
  return negative(word, f) ? -code : code;
}
uint32_t word_of(int64_t key, lns_format f) {
  return key < 0 ? static_cast<uint32_t>(-key) | 1u << (f.bits - 1) : static_cast<uint32_t>(key);
}

/* body(output index, taps): the input index of each tap of a window, −1 for padding, in the kernel's order. */
template <class Body>
void for_windows(const lns_window& w, int64_t outer, const int64_t* size, const int64_t* out, int threads, Body body) {
  const int64_t plane = product(product(size[0], size[1]), size[2]);
  const int64_t positions = product(product(out[0], out[1]), out[2]);
  const int64_t taps = product(product(w.kernel[0], w.kernel[1]), w.kernel[2]);
  if (taps > 1 << 24) fail(LNS_BAD_VALUE, "a window of %lld positions", static_cast<long long>(taps));
  product(outer, std::max(plane, positions));
  /* the taps of a position serve all images; positions are shared out */
  parallel(positions, threads, [&](int64_t position) {
    const int64_t at[3] = {position / (out[1] * out[2]), position / out[2] % out[1], position % out[2]};
    std::vector<int64_t> index(static_cast<size_t>(taps));
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t tap[3] = {i / (w.kernel[1] * w.kernel[2]), i / w.kernel[2] % w.kernel[1], i % w.kernel[2]};
      int64_t where[3];
      bool valid = true;
      for (size_t j = 0; j < 3; ++j) {
        where[j] = at[j] * w.strides[j] - w.pads[j] + tap[j] * w.dilations[j];
        valid = valid && where[j] >= 0 && where[j] < size[j];
      }
      index[static_cast<size_t>(i)] = valid ? (where[0] * size[1] + where[1]) * size[2] + where[2] : -1;
    }
    body(position, index, plane, positions);
  });
}

/* The log adder in 64 bits: codes with their sign, 0 is zero. */
using stages::Coded;

class Adder {
 public:
  explicit Adder(const lns_adder& a) : largest((int64_t{1} << a.acc_bits) - 1), guard(a.guard_bits), a_(a) {
    if (a.acc_bits < 1 || a.acc_bits > 40) fail(LNS_BAD_VALUE, "acc_bits must be 1 to 40, not %d", a.acc_bits);
    if (a.guard_bits < 0 || a.guard_bits > 8) fail(LNS_BAD_VALUE, "guard_bits must be 0 to 8, not %d", a.guard_bits);
    if (a.delta_plus_count < 0 || a.delta_minus_count < 0) fail(LNS_BAD_VALUE, "a delta table of negative length");
    if (a.delta_plus_count) need(a.delta_plus, "delta_plus");
    if (a.delta_minus_count) need(a.delta_minus, "delta_minus");
  }
  /* spec 5.1 */
  Coded enter(uint32_t word, lns_format f, int64_t shift) const {
    return stages::enter(code_of(word, f), negative(word, f), shift, largest, guard);
  }
  /* spec 5.2, 5.3 */
  Coded add(Coded x, Coded y) const {
    return stages::add(x, y, a_.delta_plus, a_.delta_plus_count, a_.delta_minus, a_.delta_minus_count, largest);
  }
  /* spec 5.6 */
  int64_t leave(int64_t code) const { return stages::leave(code, guard); }

  const int64_t largest;
  const int guard;

 private:
  const lns_adder& a_;
};

int64_t floor_of(int64_t a, int64_t b) { return a / b - (a % b < 0); }

void check_shift(int64_t value, const char* what) {
  if (value < -(int64_t{1} << 56) || value > int64_t{1} << 56) {
    fail(LNS_BAD_VALUE, "%s is %lld", what, static_cast<long long>(value));
  }
}

}  // namespace
}  // namespace lns

using namespace lns;

int32_t lns_window_output(const lns_window* window, const int64_t* input, int64_t* output, lns_error* error) {
  return guarded(error, [&] {
    need(window, "window");
    need(input, "input");
    need(output, "output");
    window_output(*window, input, output);
  });
}

int32_t lns_encode(const float* x, int64_t count, const float* thresholds, int64_t threshold_count, lns_format format,
                   void* words, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    check_format(format, "output");
    if (threshold_count != max_code(format)) {
      fail(LNS_BAD_VALUE, "a format of %d bits has %lld thresholds, not %lld", format.bits,
           static_cast<long long>(max_code(format)), static_cast<long long>(threshold_count));
    }
    need(thresholds, "thresholds");
    if (count) need(x, "x"), need(words, "words");
    /* by the bits of a non-negative float, which are in its order */
    std::vector<uint32_t> bounds(static_cast<size_t>(threshold_count) + 1);
    for (int64_t i = 0; i < threshold_count; ++i) {
      const float t = thresholds[i];
      if (!(t >= 0) || (i && t < thresholds[i - 1])) {
        fail(LNS_BAD_VALUE, "thresholds must be sorted and at least 0; entry %lld is not", static_cast<long long>(i));
      }
      const float positive = t == 0 ? 0.0f : t; /* no −0 */
      std::memcpy(&bounds[static_cast<size_t>(i)], &positive, 4);
    }
    bounds.back() = UINT32_MAX;
    /* codes by the leading bits; what is left is compared */
    int drop = 23;
    while (drop > 8 && (int64_t{256} << (23 - drop)) < 8 * threshold_count) --drop;
    std::vector<int32_t> start((size_t{1} << (31 - drop)) + 1);
    int32_t k = 0;
    for (size_t i = 0; i < start.size(); ++i) {
      while (k < threshold_count && bounds[static_cast<size_t>(k)] <= (static_cast<uint64_t>(i) << drop)) ++k;
      start[i] = k;
    }
    const uint32_t sign_bit = format.is_signed ? 1u << (format.bits - 1) : 0;
    const bool is_signed = format.is_signed != 0;
    const auto run = [&](auto* out) {
      blocks(count, threads, kBlock, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          uint32_t bits;
          std::memcpy(&bits, x + i, 4);
          const bool minus = (bits >> 31) != 0;
          bits &= 0x7fffffff;
          uint32_t word = 0;
          if (bits <= 0x7f800000) { /* NaN becomes zero */
            if (minus && !is_signed) bits = 0;
            int32_t code = start[bits >> drop];
            while (bounds[static_cast<size_t>(code)] <= bits) ++code;
            word = static_cast<uint32_t>(code);
            if (minus && code && bits) word |= sign_bit;
          }
          out[i] = static_cast<std::remove_reference_t<decltype(*out)>>(word);
        }
      });
    };
    if (bytes_of(format) == 1) {
      run(static_cast<uint8_t*>(words));
    } else {
      run(static_cast<uint16_t*>(words));
    }
  });
}

int32_t lns_decode(const void* words, int32_t bytes, int64_t count, const float* table, int64_t table_count, float* x,
                   int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (bytes != 1 && bytes != 2) fail(LNS_BAD_VALUE, "words have 1 or 2 bytes, not %d", bytes);
    if (table_count < 1 || table_count > 65536 || (table_count & (table_count - 1))) {
      fail(LNS_BAD_VALUE, "a table of %lld values is not one of 2^bits", static_cast<long long>(table_count));
    }
    need(table, "table");
    if (count) need(words, "words"), need(x, "x");
    const auto mask = static_cast<uint32_t>(table_count - 1);
    const auto run = [&](const auto* in) {
      blocks(count, threads, kBlock, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) x[i] = table[in[i] & mask];
      });
    };
    if (bytes == 1) {
      run(static_cast<const uint8_t*>(words));
    } else {
      run(static_cast<const uint16_t*>(words));
    }
  });
}

int32_t lns_relu(const void* x, int64_t count, lns_format format, void* y, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    check_format(format, "words");
    if (count) need(x, "x"), need(y, "y");
    const auto run = [&](const auto* in, auto* out) {
      using Word = std::remove_reference_t<decltype(*out)>;
      blocks(count, threads, kBlock, [&](int64_t first, int64_t last) {
        /* kept where words that are written cannot be thought to change it */
        const auto mask = static_cast<Word>((uint32_t{1} << format.bits) - 1);
        const auto sign = static_cast<Word>(format.is_signed ? uint32_t{1} << (format.bits - 1) : 0);
        const auto *from = in + first, *end = in + last;
        for (auto* to = out + first; from != end; ++from, ++to) {
          const auto positive = static_cast<Word>((*from & sign) == 0 ? mask : 0);
          *to = static_cast<Word>(*from & positive);
        }
      });
    };
    if (bytes_of(format) == 1) {
      run(static_cast<const uint8_t*>(x), static_cast<uint8_t*>(y));
    } else {
      run(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
    }
  });
}

int32_t lns_clip(const void* x, int64_t count, lns_format format, int64_t low, int64_t high, void* y, int32_t threads,
                 lns_error* error) {
  return guarded(error, [&] {
    check_format(format, "words");
    const int64_t most = max_code(format), least = format.is_signed ? -most : 0;
    if (low > high || low < least || high > most) {
      fail(LNS_BAD_VALUE, "limits %lld and %lld: codes from %lld to %lld in order are needed",
           static_cast<long long>(low), static_cast<long long>(high), static_cast<long long>(least),
           static_cast<long long>(most));
    }
    map_words(x, count, format, y, bytes_of(format), threads,
              [&](uint32_t w) { return word_of(std::min(std::max<int64_t>(key_of(w, format), low), high), format); });
  });
}

int32_t lns_rescale(const lns_rescale_desc* desc, const void* x, int64_t count, void* y, int32_t threads,
                    lns_counts* counts, lns_error* error) {
  return guarded(error, [&] {
    need(desc, "desc");
    const lns_rescale_desc& d = *desc;
    check_format(d.input, "input");
    const Output out(d.output);
    constexpr int64_t most = 1 << 24;
    if (d.multiply < 1 || d.divide < 1 || d.multiply > most || d.divide > most || (d.multiply > 1 && d.divide > 1)) {
      fail(LNS_BAD_VALUE, "multiply and divide are at least 1, and one of them is 1; not %lld and %lld",
           static_cast<long long>(d.multiply), static_cast<long long>(d.divide));
    }
    const int64_t widest = int64_t{1} << 36;
    if (std::abs(d.input_offset) > widest || std::abs(d.output_offset) > int64_t{1} << 56) {
      fail(LNS_BAD_VALUE, "offsets %lld and %lld are out of range", static_cast<long long>(d.input_offset),
           static_cast<long long>(d.output_offset));
    }
    const size_t words = size_t{1} << d.input.bits;
    std::vector<lns_counts> by_word(words, lns_counts{0, 0, 0, 0});
    const auto convert = [&](uint32_t w) -> uint32_t {
      const int64_t code = code_of(w, d.input);
      const bool minus = negative(w, d.input);
      if (code == 0 || (minus && out.sign_bit == 0)) return 0; /* zero stays zero */
      const int64_t at = code + d.input_offset;
      const int64_t scaled = d.divide > 1 ? floor_of(2 * at + d.divide, 2 * d.divide) : at * d.multiply;
      return out.word(scaled - d.output_offset, minus, false, by_word[w]);
    };
    map_words(x, count, d.input, y, out.bytes, threads, convert);
    if (!counts) return;
    lns_counts found = {count, 0, 0, 0};
    const int bytes = bytes_of(d.input);
    const uint32_t mask = static_cast<uint32_t>(words - 1);
    for (int64_t i = 0; i < count; ++i) {
      const lns_counts& c = by_word[load_word(x, bytes, i) & mask];
      found.saturated += c.saturated;
      found.flushed += c.flushed;
      found.saturated_negative += c.saturated_negative;
    }
    std::mutex mutex;
    add_to(counts, found, mutex);
  });
}

int32_t lns_max_pool(const void* x, int64_t outer, const int64_t* size, lns_format format, const lns_window* window,
                     void* y, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    need(size, "size");
    need(window, "window");
    check_format(format, "words");
    int64_t out[3];
    window_output(*window, size, out);
    if (outer < 0) fail(LNS_BAD_VALUE, "%lld images", static_cast<long long>(outer));
    if (outer == 0) return;
    need(x, "x");
    need(y, "y");
    const int bytes = bytes_of(format);
    const auto lowest = static_cast<int32_t>(format.is_signed ? -max_code(format) : 0);
    std::vector<int32_t> keys(size_t{1} << format.bits);
    for (uint32_t w = 0; w < keys.size(); ++w) keys[w] = key_of(w, format);
    const uint32_t mask = static_cast<uint32_t>(keys.size() - 1);
    for_windows(*window, outer, size, out, threads,
                [&](int64_t position, const std::vector<int64_t>& index, int64_t plane, int64_t positions) {
                  if (std::all_of(index.begin(), index.end(), [](int64_t i) { return i < 0; })) {
                    fail(LNS_BAD_VALUE, "a window of the max pooling holds padding only: use smaller pads");
                  }
                  for (int64_t o = 0; o < outer; ++o) {
                    int32_t best = lowest;
                    for (int64_t i : index) {
                      if (i >= 0) best = std::max(best, keys[load_word(x, bytes, o * plane + i) & mask]);
                    }
                    const uint32_t word = word_of(best, format);
                    const int64_t at = o * positions + position;
                    if (bytes == 1) {
                      static_cast<uint8_t*>(y)[at] = static_cast<uint8_t>(word);
                    } else {
                      static_cast<uint16_t*>(y)[at] = static_cast<uint16_t>(word);
                    }
                  }
                });
  });
}

int32_t lns_add(const lns_add_desc* desc, int32_t rank, const int64_t* shape, const void* a, const int64_t* a_strides,
                const void* b, const int64_t* b_strides, void* y, int32_t threads, lns_counts* counts,
                lns_error* error) {
  return guarded(error, [&] {
    need(desc, "desc");
    const lns_add_desc& d = *desc;
    check_format(d.a, "a");
    check_format(d.b, "b");
    const Output out(d.output);
    const Adder adder(d.adder);
    check_shift(d.a_shift, "a_shift");
    check_shift(d.b_shift, "b_shift");
    check_shift(d.code_shift, "code_shift");
    if (rank < 0 || rank > 8) fail(LNS_BAD_VALUE, "at most 8 axes, not %d", rank);
    if (rank) need(shape, "shape"), need(a_strides, "a_strides"), need(b_strides, "b_strides");
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count = product(count, shape[i]);
    if (count == 0) return;
    need(a, "a");
    need(b, "b");
    need(y, "y");
    const auto entries = [&](lns_format f, int64_t shift) {
      std::vector<Coded> made(size_t{1} << f.bits);
      for (uint32_t w = 0; w < made.size(); ++w) made[w] = adder.enter(w, f, shift);
      return made;
    };
    const auto a_entries = entries(d.a, d.a_shift), b_entries = entries(d.b, d.b_shift);
    const int a_bytes = bytes_of(d.a), b_bytes = bytes_of(d.b);
    const auto a_mask = static_cast<uint32_t>(a_entries.size() - 1),
               b_mask = static_cast<uint32_t>(b_entries.size() - 1);
    /* what two words give, and how it is counted */
    const auto sum_of = [&](uint32_t u, uint32_t v, lns_counts& found) {
      const Coded sum = adder.add(a_entries[u], b_entries[v]);
      const bool zero = sum.code == 0;
      return out.word(adder.leave(sum.code) + d.code_shift, sum.minus && !zero, zero, found);
    };
    /* many pairs of narrow words: each pair that there can be is added once, and looked up */
    std::vector<uint32_t> pairs;
    if (d.a.bits <= 8 && d.b.bits <= 8 && count >= kPairs) {
      pairs.resize(a_entries.size() * b_entries.size());
      for (uint32_t u = 0; u <= a_mask; ++u) {
        for (uint32_t v = 0; v <= b_mask; ++v) {
          lns_counts one = {0, 0, 0, 0};
          const uint32_t word = sum_of(u, v, one);
          pairs[u << d.b.bits | v] = word | static_cast<uint32_t>(one.saturated) << 16 |
                                     static_cast<uint32_t>(one.saturated_negative) << 17 |
                                     static_cast<uint32_t>(one.flushed) << 18;
        }
      }
    }
    bool plain = !pairs.empty() && out.bytes == 1;
    for (int64_t j = rank - 1, step = 1; j >= 0; step *= shape[j--]) {
      plain = plain && (shape[j] == 1 || (a_strides[j] == step && b_strides[j] == step));
    }
    std::mutex mutex;
    blocks(count, threads, kBlock, [&](int64_t first, int64_t last) {
      lns_counts found = {last - first, 0, 0, 0};
      if (plain) {
        const auto *left = static_cast<const uint8_t*>(a), *right = static_cast<const uint8_t*>(b);
        auto* to = static_cast<uint8_t*>(y);
        const uint32_t* const table = pairs.data();
        const uint32_t left_mask = a_mask, right_mask = b_mask;
        const int right_bits = d.b.bits;
        /* three counts side by side, none of which reaches 2^20 in a block */
        uint64_t counted = 0;
        static_assert(kBlock < 1 << 20, "counts of a block have 20 bits");
        for (int64_t i = first; i < last; ++i) {
          const uint32_t pair = table[(left[i] & left_mask) << right_bits | (right[i] & right_mask)];
          to[i] = static_cast<uint8_t>(pair);
          const uint64_t flags = pair >> 16;
          counted += (flags & 1) | (flags & 2) << 19 | (flags & 4) << 38;
        }
        constexpr uint64_t one_count = (1 << 20) - 1;
        found.saturated = static_cast<int64_t>(counted & one_count);
        found.saturated_negative = static_cast<int64_t>(counted >> 20 & one_count);
        found.flushed = static_cast<int64_t>(counted >> 40);
        add_to(counts, found, mutex);
        return;
      }
      std::array<int64_t, 8> at{};
      int64_t rest = first, i_a = 0, i_b = 0;
      for (int j = rank - 1; j >= 0; --j) {
        const auto axis = static_cast<size_t>(j);
        at[axis] = rest % shape[j];
        rest /= shape[j];
        i_a += at[axis] * a_strides[j];
        i_b += at[axis] * b_strides[j];
      }
      for (int64_t i = first; i < last; ++i) {
        const uint32_t u = load_word(a, a_bytes, i_a) & a_mask, v = load_word(b, b_bytes, i_b) & b_mask;
        out.store(y, i, sum_of(u, v, found));
        for (int j = rank - 1; j >= 0; --j) {
          const auto axis = static_cast<size_t>(j);
          i_a += a_strides[j];
          i_b += b_strides[j];
          if (++at[axis] < shape[j]) break;
          at[axis] = 0;
          i_a -= a_strides[j] * shape[j];
          i_b -= b_strides[j] * shape[j];
        }
      }
      add_to(counts, found, mutex);
    });
  });
}

int32_t lns_average_pool(const lns_average_desc* desc, const void* x, int64_t outer, const int64_t* size,
                         const lns_window* window, void* y, int32_t threads, lns_counts* counts, lns_error* error) {
  return guarded(error, [&] {
    need(desc, "desc");
    need(size, "size");
    need(window, "window");
    const lns_average_desc& d = *desc;
    check_format(d.input, "input");
    const Output out(d.output);
    const Adder adder(d.adder);
    check_shift(d.input_shift, "input_shift");
    check_shift(d.code_shift, "code_shift");
    if (d.lanes < 1 || d.lanes > 1024) fail(LNS_BAD_VALUE, "lanes must be 1 to 1024, not %d", d.lanes);
    int64_t sizes[3];
    window_output(*window, size, sizes);
    for (size_t j = 0; j < 3; ++j) {
      if (d.log_count_shape[j] != 1 && d.log_count_shape[j] != sizes[j]) {
        fail(LNS_BAD_VALUE, "log_counts has %lld entries along an axis of %lld results",
             static_cast<long long>(d.log_count_shape[j]), static_cast<long long>(sizes[j]));
      }
    }
    if (outer < 0) fail(LNS_BAD_VALUE, "%lld images", static_cast<long long>(outer));
    if (outer == 0) return;
    need(d.log_counts, "log_counts");
    need(x, "x");
    need(y, "y");
    std::vector<Coded> entries(size_t{1} << d.input.bits);
    for (uint32_t w = 0; w < entries.size(); ++w) entries[w] = adder.enter(w, d.input, d.input_shift);
    const auto mask = static_cast<uint32_t>(entries.size() - 1);
    const int bytes = bytes_of(d.input);
    std::mutex mutex;
    for_windows(*window, outer, size, sizes, threads,
                [&](int64_t position, const std::vector<int64_t>& index, int64_t plane, int64_t positions) {
                  const int64_t at[3] = {position / (sizes[1] * sizes[2]), position / sizes[2] % sizes[1],
                                         position % sizes[2]};
                  int64_t which = 0;
                  for (size_t j = 0; j < 3; ++j) {
                    which = which * d.log_count_shape[j] + (d.log_count_shape[j] == 1 ? 0 : at[j]);
                  }
                  const int64_t divisor = d.log_counts[which];
                  check_shift(divisor, "an entry of log_counts");
                  lns_counts found = {outer, 0, 0, 0};
                  std::vector<Coded> level(static_cast<size_t>(d.lanes));
                  for (int64_t o = 0; o < outer; ++o) {
                    Coded sum = {0, false};
                    for (size_t first = 0; first < index.size(); first += static_cast<size_t>(d.lanes)) {
                      size_t count = std::min(index.size() - first, static_cast<size_t>(d.lanes));
                      for (size_t j = 0; j < count; ++j) {
                        const int64_t i = index[first + j];
                        level[j] = i < 0 ? Coded{0, false} : entries[load_word(x, bytes, o * plane + i) & mask];
                      }
                      while (count > 1) { /* spec 5.4 */
                        for (size_t j = 0; j < count / 2; ++j) level[j] = adder.add(level[2 * j], level[2 * j + 1]);
                        if (count % 2) level[count / 2] = level[count - 1];
                        count = (count + 1) / 2;
                      }
                      sum = adder.add(sum, level[0]);
                    }
                    const int64_t average = sum.code - divisor;
                    const bool zero = sum.code == 0 || average < 1;
                    out.store(y, o * positions + position,
                              out.word(adder.leave(average) + d.code_shift, sum.minus && !zero, zero, found));
                  }
                  add_to(counts, found, mutex);
                });
  });
}
