/* What emulating on the fly needs beside the kernels: encoding at offsets that change with every batch or channel, and
 * histograms of words, from which offsets, counts and ranges follow exactly. */
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "internal.h"

namespace lns {
namespace {

constexpr int64_t kGamma = 1 << 14; /* above, two thresholds might share one of 2^16 buckets */
constexpr int kMantissa = 23;
constexpr int64_t kHot = 1 << 14; /* words that are counted while they are in the cache */
constexpr uint32_t kInfinity = 0x7f800000;

/* Absolute codes of float32 magnitudes by their bits (spec 2.1): octave · γ + how many thresholds the mantissa
 * reaches. The buckets of leading mantissa bits are so narrow that each holds one threshold at most. */
class Codes {
 public:
  Codes(int64_t gamma, const int32_t* thresholds) : gamma_(static_cast<int32_t>(gamma)) {
    int index_bits = 2;
    while ((int64_t{1} << index_bits) < 4 * gamma && index_bits < 16) ++index_bits;
    drop_ = kMantissa - index_bits;
    const size_t buckets = size_t{1} << index_bits;
    base_ = std::make_shared<std::vector<int32_t>>(buckets);
    bound_ = std::make_shared<std::vector<uint32_t>>(buckets);
    int64_t k = 0;
    for (size_t i = 0; i < buckets; ++i) {
      const auto start = static_cast<int64_t>(i) << drop_, end = start + (int64_t{1} << drop_);
      while (k < gamma && thresholds[k] <= start) ++k;
      (*base_)[i] = static_cast<int32_t>(k);
      (*bound_)[i] = k < gamma ? static_cast<uint32_t>(thresholds[k]) : UINT32_MAX;
      if (k + 1 < gamma && thresholds[k + 1] < end) {
        fail(LNS_BAD_VALUE, "thresholds %lld and %lld are closer than those of gamma %lld can be",
             static_cast<long long>(k), static_cast<long long>(k + 1), static_cast<long long>(gamma));
      }
    }
    bases_ = base_->data(), bounds_ = bound_->data();
  }
  /* of a finite magnitude that is not zero */
  int32_t operator()(uint32_t bits) const {
    int32_t exponent = static_cast<int32_t>(bits >> kMantissa) - 127;
    uint32_t mantissa = bits & ((1u << kMantissa) - 1);
    if (__builtin_expect(exponent == -127, 0)) { /* subnormal: the stored integer times 2^-149 */
      const int leading = 31 - __builtin_clz(mantissa);
      exponent = leading - 149;
      mantissa = mantissa << (kMantissa - leading) & ((1u << kMantissa) - 1);
    }
    const uint32_t bucket = mantissa >> drop_;
    return exponent * gamma_ + bases_[bucket] + (mantissa >= bounds_[bucket]);
  }

 private:
  int32_t gamma_;
  int drop_;
  std::shared_ptr<std::vector<int32_t>> base_; /* shared by the copies that threads take */
  std::shared_ptr<std::vector<uint32_t>> bound_;
  const int32_t* bases_;
  const uint32_t* bounds_;
};

/* How often each word comes; two tables, so that equal neighbours do not wait for each other. */
template <class Word>
void count_words(const Word* words, int64_t count, uint32_t mask, uint32_t* even, uint32_t* odd) {
  int64_t i = 0;
  for (; i + 1 < count; i += 2) ++even[words[i] & mask], ++odd[words[i + 1] & mask];
  if (i < count) ++even[words[i] & mask];
}

/* Histograms of tasks joined to the caller's. */
class Histogram {
 public:
  Histogram(int64_t* out, int64_t bins) : out_(out), bins_(bins) {}
  std::vector<uint32_t> begin() const { return std::vector<uint32_t>(out_ ? static_cast<size_t>(bins_) : 0, 0); }
  void end(const std::vector<uint32_t>& found) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < found.size(); ++i) out_[i] += found[i];
  }

 private:
  int64_t* out_;
  int64_t bins_;
  std::mutex mutex_;
};

void need(const void* pointer, const char* what) {
  if (!pointer) fail(LNS_BAD_VALUE, "%s is missing", what);
}

/* body(first, last) over pieces of 0 … count − 1: at least as long as a histogram, at most 2^30. */
template <class Body>
void pieces(int64_t count, int32_t threads, int64_t bins, Body body) {
  if (count <= 0) return;
  const int64_t least = std::max<int64_t>(1 << 14, 4 * bins), fair = count / (4 * std::max<int64_t>(threads, 1)) + 1;
  const int64_t length = std::min<int64_t>(std::max(least, fair), 1 << 30);
  parallel((count + length - 1) / length, threads,
           [&](int64_t i) { body(i * length, std::min(count, (i + 1) * length)); });
}

}  // namespace
}  // namespace lns

using namespace lns;

int32_t lns_encode_channels(const float* x, int64_t channels, int64_t inner, int64_t gamma, const int32_t* thresholds,
                            const int64_t* offsets, lns_output output, void* words, int64_t* histogram, int32_t threads,
                            lns_error* error) {
  return guarded(error, [&] {
    check_format(output.format, "output");
    if (gamma < 1 || gamma > kGamma) {
      fail(LNS_UNSUPPORTED, "gamma must be 1 to %lld, not %lld", static_cast<long long>(kGamma),
           static_cast<long long>(gamma));
    }
    const int64_t count = product(channels, inner);
    if (!count) return;
    need(x, "x"), need(thresholds, "thresholds"), need(offsets, "offsets"), need(words, "words");
    for (int64_t i = 0; i < gamma; ++i) {
      if (thresholds[i] < 0 || thresholds[i] > 1 << kMantissa || (i && thresholds[i] < thresholds[i - 1])) {
        fail(LNS_BAD_VALUE, "thresholds must be sorted, from 0 to 2^23; entry %lld is not", static_cast<long long>(i));
      }
    }
    const Codes codes(gamma, thresholds);
    const auto largest = static_cast<int32_t>(max_code(output.format));
    const int32_t least = output.underflow_min ? 1 : 0;
    const bool is_signed = output.format.is_signed != 0;
    const uint32_t sign_bit = is_signed ? 1u << (output.format.bits - 1) : 0;
    const int64_t bins = int64_t{1} << output.format.bits;
    Histogram joined(histogram, bins);
    const auto run = [&](auto* out) {
      using Word = std::remove_reference_t<decltype(*out)>;
      pieces(count, threads, bins, [&](int64_t first, int64_t last) {
        std::vector<uint32_t> even = joined.begin(), odd = joined.begin();
        /* words may be bytes, which alias everything: what the loop reads is its own */
        const Codes mine = codes;
        const float* const in = x;
        Word* const to = out;
        for (int64_t i = first; i < last;) {
          const int64_t channel = i / inner;
          const int64_t begin = i, end = std::min({last, (channel + 1) * inner, begin + kHot});
          /* beyond every code either way, and far from the ends of 32 bits */
          const auto offset = static_cast<int32_t>(
              std::min<int64_t>(std::max<int64_t>(offsets[channel], -(int64_t{1} << 29)), int64_t{1} << 29));
          for (; i < end; ++i) {
            uint32_t bits;
            std::memcpy(&bits, in + i, 4);
            const uint32_t minus = bits >> 31;
            bits &= 0x7fffffff;
            int32_t code;
            if (bits - 1 < kInfinity - 1) {
              code = std::max(std::min(mine(bits) - offset, largest), least);
            } else { /* zero, which has no sign; infinity; NaN */
              code = bits == kInfinity ? largest : least;
              if (bits != kInfinity) bits = 0;
            }
            /* without branches: signs are random */
            code = (minus & !is_signed) != 0 ? least : code;
            const uint32_t sign = sign_bit & (0u - (minus & (code != 0) & (bits != 0)));
            const auto word = static_cast<Word>(static_cast<uint32_t>(code) | sign);
            to[i] = word;
          }
          const auto mask = static_cast<uint32_t>(bins - 1);
          if (!even.empty()) count_words(to + begin, end - begin, mask, even.data(), odd.data());
        }
        joined.end(even), joined.end(odd);
      });
    };
    if (bytes_of(output.format) == 1) {
      run(static_cast<uint8_t*>(words));
    } else {
      run(static_cast<uint16_t*>(words));
    }
  });
}

int32_t lns_histogram(const void* words, int32_t bytes, int64_t count, int32_t bits, int64_t* histogram,
                      int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (bytes != 1 && bytes != 2) fail(LNS_BAD_VALUE, "words have 1 or 2 bytes, not %d", bytes);
    if (bits < 1 || bits > 16) fail(LNS_BAD_VALUE, "bits must be 1 to 16, not %d", bits);
    need(histogram, "histogram");
    if (product(count, bytes)) need(words, "words");
    const int64_t bins = int64_t{1} << bits;
    Histogram joined(histogram, bins);
    const auto run = [&](const auto* in) {
      pieces(count, threads, bins, [&](int64_t first, int64_t last) {
        std::vector<uint32_t> even = joined.begin(), odd = joined.begin();
        count_words(in + first, last - first, static_cast<uint32_t>(bins - 1), even.data(), odd.data());
        joined.end(even), joined.end(odd);
      });
    };
    if (bytes == 1) {
      run(static_cast<const uint8_t*>(words));
    } else {
      run(static_cast<const uint16_t*>(words));
    }
  });
}

int32_t lns_round_floats(const float* x, int64_t channels, int64_t inner, int32_t drop, int32_t first,
                         const int32_t* bounds, const int32_t* values, int64_t buckets, const int32_t* low,
                         const int32_t* high, int64_t limits, int32_t is_signed, int32_t least, float* y,
                         int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (!product(channels, inner)) return;
    need(x, "x"), need(bounds, "bounds"), need(values, "values"), need(low, "low"), need(high, "high"), need(y, "y");
    if (drop < 0 || drop > kMantissa) fail(LNS_BAD_VALUE, "drop must be 0 to %d, not %d", kMantissa, drop);
    if (limits != 1 && limits != channels) {
      fail(LNS_BAD_VALUE, "there must be 1 or %lld limits, not %lld", static_cast<long long>(channels),
           static_cast<long long>(limits));
    }
    for (int64_t i = 0; i < limits; ++i) {
      const int64_t least_bucket = (low[i] >> drop) - int64_t{first}, last_bucket = (high[i] >> drop) - int64_t{first};
      if (low[i] < 0 || low[i] > high[i] || least_bucket < 0 || last_bucket >= buckets) {
        fail(LNS_BAD_VALUE, "limits %lld are not within the %lld buckets", static_cast<long long>(i),
             static_cast<long long>(buckets));
      }
    }
    const Isa& isa = current_isa();
    const Rounding rounding{drop, first, bounds, values, is_signed != 0, least != 0};
    /* many short channels are tasks together, long ones are cut */
    const int64_t length = 1 << 15, group = std::max<int64_t>(1, length / std::max<int64_t>(inner, 1));
    const int64_t cuts = (inner + length - 1) / length, tasks = (channels + group - 1) / group * cuts;
    std::atomic<bool> bad{false};
    parallel(tasks, threads, [&](int64_t task) {
      const int64_t from = task / cuts * group, column = task % cuts * length;
      for (int64_t c = from; c < std::min(channels, from + group); ++c) {
        const int64_t at = c * inner + column, count = std::min(inner - column, length);
        const int64_t limit = limits == 1 ? 0 : c;
        const int32_t top = isa.round(rounding, low[limit], high[limit], count,
                                      reinterpret_cast<const int32_t*>(x) + at, reinterpret_cast<int32_t*>(y) + at);
        if (static_cast<uint32_t>(top) > kInfinity) bad = true;
      }
    });
    if (bad) fail(LNS_BAD_VALUE, "x contains NaN, which has no LNS word");
  });
}

int32_t lns_largest_sums(int64_t rows, int64_t depth, int64_t channels, int64_t bins, int64_t columns,
                         const double* values, const uint8_t* bins_of, const int32_t* a, const int32_t* w,
                         const double* start, double* peak, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (channels <= 0) return;
    need(start, "start");
    need(peak, "peak");
    if (bins < 1 || (bins > 1 && !bins_of)) fail(LNS_BAD_VALUE, "%lld bins", static_cast<long long>(bins));
    if (columns < 0 || columns > 1 << 28) fail(LNS_BAD_VALUE, "%lld values", static_cast<long long>(columns));
    const int64_t operands = product(rows, depth), weights = product(depth, channels);
    if (operands && weights) {
      need(values, "values");
      need(a, "a");
      need(w, "w");
    }
    int64_t most_a = 0, most_w = 0;
    for (int64_t i = 0; i < operands; ++i) most_a = std::max<int64_t>(most_a, std::abs(int64_t{a[i]}));
    for (int64_t i = 0; i < weights; ++i) most_w = std::max<int64_t>(most_w, std::abs(int64_t{w[i]}));
    if (operands && weights && most_a + most_w >= columns) {
      fail(LNS_BAD_VALUE, "a sum of codes of %lld, but %lld values", static_cast<long long>(most_a + most_w),
           static_cast<long long>(columns));
    }
    for (int64_t n = 0; n < channels; ++n) peak[n] = std::abs(start[n]);
    const int64_t parts = std::min<int64_t>(std::max<int64_t>(rows, 0), 64);
    const size_t width = static_cast<size_t>(channels), every = static_cast<size_t>(bins) * width;
    /* what a product adds by its code sum, then zeros, for weights of zero, and from `middle` on the same with the other
     * sign; so weights and signs of activations are places in it */
    const size_t codes = static_cast<size_t>(columns), middle = 2 * codes;
    std::vector<double> terms(2 * middle, 0.0);
    std::vector<int32_t> places(static_cast<size_t>(weights)), others(static_cast<size_t>(weights));
    if (operands) {
      for (size_t i = 0; i < codes; ++i) terms[i] = values[i], terms[middle + i] = -values[i];
      for (size_t i = 0; i < places.size(); ++i) {
        const auto code = static_cast<size_t>(std::abs(int64_t{w[i]}));
        places[i] = static_cast<int32_t>(code == 0 ? codes : w[i] < 0 ? middle + code : code);
        others[i] = static_cast<int32_t>(code == 0 ? codes : w[i] < 0 ? code : middle + code);
      }
    }
    std::vector<double> peaks(static_cast<size_t>(parts) * width);
    parallel(parts, threads, [&](int64_t part) {
      double* top = peaks.data() + static_cast<size_t>(part) * width;
      std::vector<double> sums(every);
      for (int64_t row = part; row < rows; row += parts) {
        std::fill(sums.begin(), sums.end(), 0.0);
        std::copy(start, start + channels, sums.begin());
        for (int64_t k = 0; k < depth; ++k) {
          const int32_t x = a[row * depth + k];
          if (x == 0) continue;
          const int32_t* line = (x < 0 ? others : places).data() + k * channels;
          const double* term = terms.data() + std::abs(x);
          if (bins == 1) {
            double* sum = sums.data();
            for (size_t n = 0; n < width; ++n) {
              sum[n] += term[line[n]];
              top[n] = std::max(top[n], std::fabs(sum[n]));
            }
            continue;
          }
          const uint8_t* bin = bins_of + std::abs(x);
          const int32_t* weight = w + k * channels;
          for (size_t n = 0; n < width; ++n) {
            double& sum = sums[bin[std::abs(weight[n])] * width + n];
            sum += term[line[n]];
            top[n] = std::max(top[n], std::fabs(sum));
          }
        }
      }
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (size_t n = 0; n < width; ++n) peak[n] = std::max(peak[n], peaks[static_cast<size_t>(part) * width + n]);
    }
  });
}

int32_t lns_largest(const float* x, int64_t channels, int64_t inner, float* y, int32_t threads, lns_error* error) {
  return guarded(error, [&] {
    if (channels <= 0) return;
    need(y, "y");
    if (product(channels, inner)) need(x, "x");
    const Isa& isa = current_isa();
    const int64_t length = 1 << 16, group = std::max<int64_t>(1, length / std::max<int64_t>(inner, 1));
    if (channels == 1 && inner > length) {
      std::vector<int32_t> parts(static_cast<size_t>((inner + length - 1) / length));
      parallel(static_cast<int64_t>(parts.size()), threads, [&](int64_t i) {
        parts[static_cast<size_t>(i)] =
            isa.largest(reinterpret_cast<const int32_t*>(x) + i * length, std::min(inner - i * length, length));
      });
      const int32_t top = *std::max_element(parts.begin(), parts.end());
      std::memcpy(y, &top, 4);
      return;
    }
    parallel((channels + group - 1) / group, threads, [&](int64_t i) {
      for (int64_t c = i * group; c < std::min(channels, (i + 1) * group); ++c) {
        const int32_t top = isa.largest(reinterpret_cast<const int32_t*>(x) + c * inner, inner);
        std::memcpy(y + c, &top, 4);
      }
    });
  });
}
