/* Shared between the interface (api.cpp), the operations (ops.cpp) and the kernels of each instruction set. */
#ifndef LNS_INTERNAL_H
#define LNS_INTERNAL_H

#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../lnsdeploy/kernels/stages.h"
#include "lnsdeploy.h"

namespace lns {

/* Thrown inside, turned into a status at the interface. */
struct Failure {
  int32_t status;
  std::string message;
};
[[noreturn]] void fail(int32_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

/* a*b for sizes, or a Failure. */
int64_t product(int64_t a, int64_t b);

/* Cache-line aligned memory without initialisation. */
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { resize(count); }
  void resize(int64_t count) {
    data_.reset();
    size_ = 0;
    if (count == 0) return;
    const size_t bytes = (static_cast<size_t>(product(count, sizeof(T))) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    size_ = count;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

inline int64_t max_code(lns_format f) { return (int64_t{1} << (f.bits - f.is_signed)) - 1; }
inline int bytes_of(lns_format f) { return f.bits <= 8 ? 1 : 2; }
void check_format(lns_format f, const char* what);
/* Output sizes of a window, or a Failure that says what does not fit. */
void window_output(const lns_window& window, const int64_t* input, int64_t* output);

/* A word's code and sign; a sign with code 0 is zero (spec 1.2). */
inline uint32_t code_of(uint32_t word, lns_format f) { return word & static_cast<uint32_t>(max_code(f)); }
inline bool negative(uint32_t word, lns_format f) {
  return f.is_signed && (word >> (f.bits - 1) & 1) && code_of(word, f) != 0;
}
inline uint32_t load_word(const void* words, int bytes, int64_t i) {
  return bytes == 1 ? static_cast<const uint8_t*>(words)[i] : static_cast<const uint16_t*>(words)[i];
}

/* Codes to words (spec 2.4). */
struct Output {
  int64_t max_code, least;
  uint32_t sign_bit; /* 0 in unsigned formats */
  int bytes;
  explicit Output(lns_output o);

  uint32_t word(int64_t code, bool minus, bool zero, lns_counts& counts) const {
    return stages::limited(code, minus, zero, max_code, static_cast<uint32_t>(least), sign_bit, counts);
  }
  void store(void* words, int64_t i, uint32_t w) const {
    if (bytes == 1) {
      static_cast<uint8_t*>(words)[i] = static_cast<uint8_t>(w);
    } else {
      static_cast<uint16_t*>(words)[i] = static_cast<uint16_t>(w);
    }
  }
};

/* The raw code of a magnitude (spec 4.6): how many of the sorted thresholds it reaches. A table indexed by the leading
 * one and the bits after it says how many are certain; the few that are left are compared. Vectors compare `steps` of
 * them always. */
class RawCode {
 public:
  void build(const int64_t* thresholds, int64_t count);
  int64_t operator()(uint64_t magnitude) const {
    return stages::raw_code(magnitude, thresholds.data(), start.data(), bits);
  }

  int bits = 0;
  int steps = 0;                    /* thresholds in one slot, at most */
  std::vector<uint64_t> thresholds; /* and one that nothing reaches */
  /* the same for 32 bits, less 2^31 so that signed integers compare like unsigned ones */
  std::vector<int32_t> thresholds32;
  std::vector<int32_t> start;
};

using stages::fit;

/* ---- layers ---------------------------------------------------------------------------------------------- */

enum class Kind {
  fp32,      /* products in float32, sums in int32 */
  fp32_wide, /* products in float32, sums in float64 that are exact integers */
  fp64,      /* products in float64 as well */
  mitchell,  /* products are integer sums read as float32 */
  gather,    /* terms by code sum, one accumulator of 32 bits */
  bins,      /* terms by code sum, the bins of 32 bits side by side */
  general,   /* linear, anything */
  log8,      /* byte lanes, Δ in registers */
  log16,     /* 16-bit lanes, Δ in registers or looked up */
  log32,     /* 32-bit lanes, Δ gathered */
  log_general,
};

struct Layer;

/* One block of rows times some columns of a group. */
struct Tile {
  const Layer* layer;
  int64_t group;
  int64_t first_panel, last_panel; /* columns, in panels of the kernel's width */
  int64_t rows;                    /* a multiple of Kernel::row_step */
  const void* a; /* packed activations [rows, depth]; expanded: [blocks of depth, rows, depth of a block] */
  void* acc;     /* [rows, columns of these panels], of Layer::acc_size bytes */
  int64_t least_code = 0, largest_code = 0; /* expanded: codes that occur in `a`, but for zero */
  const uint64_t* planes = nullptr;         /* shifted: [rows, words of depth, positive and negative] bits of `a` */
  int panel = 0;                            /* columns of a panel */
  int32_t* terms = nullptr;                 /* expanded: memory for the terms of a block, terms_bytes */
  const int32_t* entry_counts = nullptr;    /* bins: [rows, blocks of bin_block] */
  const float* row_sums = nullptr;          /* bounded: [rows, blocks of bound_depth] sums of what bounds activations */
};

/* Columns whose words are made together. */
constexpr int64_t row_words = 16;

struct Kernel {
  int panel;    /* columns packed together */
  int row_step; /* rows computed together */
  void (*run)(const Tile&);
};

/* How float32 magnitudes go to the nearest 2^(k/gamma), by their bits (spec 2.1 and 2.5 in one). A bucket of leading
 * bits has one threshold at most: below it a magnitude takes the bucket's value, from it on the next one's. */
struct Rounding {
  int drop;              /* bits below a bucket's */
  int32_t first;         /* the first bucket */
  const int32_t* bounds; /* the largest bits below the threshold */
  const int32_t* values; /* bits of values */
  bool is_signed, least; /* underflow gives the least magnitude instead of zero */
};

/* Numbers of one step of Madam or of IntegerMadam (docs/madam.md). */
struct MadamStep {
  float least, rate, bound; /* of second moments; what the normalised gradient is multiplied by; of that product */
  bool flip, ascend;        /* magnitudes below the least change their sign; zeros wake along their gradient */
};
struct CodeStep {
  MadamStep step;
  int32_t max_code, drop, compute_max; /* of codes; bits below a compute word's, and the largest code of those */
  const float* table;                  /* 2^(e/gamma) by absolute exponent */
  int32_t table_last;
};

/* All kernels of one instruction set. */
struct Isa {
  int32_t id;
  const char* name;
  /* words [rows, row_words] from the accumulators of some rows and at most row_words columns (spec 4.6, 5.6) */
  void (*words)(const Tile&, int64_t row, int64_t rows, int64_t column, int64_t columns, int32_t* words, lns_counts&);
  /* bits of floats to those of values; low and high are bits of the least and largest magnitude with codes. Returns
   * the largest magnitude's bits: above infinity's there was NaN, and y is not to be used */
  int32_t (*round)(const Rounding& rounding, int32_t low, int32_t high, int64_t count, const int32_t* x, int32_t* y);
  /* the largest magnitude's bits */
  int32_t (*largest)(const int32_t* x, int64_t count);
  /* x: by how much log2 |w| changes */
  void (*octaves)(const MadamStep& step, int64_t count, const float* w, const float* g, const float* v, float* x);
  /* y = w*x within the bounds, [1] or [count] each; returns how many are at the upper one */
  int64_t (*move)(const MadamStep& step, int64_t count, const float* w, const float* g, const float* x,
                  const float* low, const float* high, bool spread, float* y);
  /* codes moved, with random bytes or without, and the values of their upper bits; bases are [1] or [count] */
  int64_t (*step_codes)(const CodeStep& step, int64_t count, int16_t* codes, const float* g, const float* v,
                        const uint8_t* random, const int64_t* bases, bool spread, float* y);
  Kernel shifted, expanded_wrap, expanded_saturate, fp32_wrap, fp32_saturate, fp32_lanes, fp32_wide, fp64_wrap,
      fp64_saturate, fp64_lanes, mitchell_wrap, mitchell_saturate, mitchell_lanes, gather_wrap, gather_saturate,
      gather_lanes, bins, log8, log16, log16_gather, log32;
  bool has_log8, has_log16;
  bool prefers_shifted; /* even where products can be computed */
};
const Isa& isa_portable();
#ifdef LNS_HAVE_AVX2
const Isa& isa_avx2();
#endif
#ifdef LNS_HAVE_AVX512
const Isa& isa_avx512();
#endif
#ifdef LNS_HAVE_NEON
const Isa& isa_neon();
#endif

struct Layer {
  Kind kind;
  std::string kernel_name;
  Kernel kernel;
  lns_format activation, weight;
  Output output;
  int64_t activation_widen, weight_widen;
  int64_t groups, columns, depth; /* columns and depth of one group */
  int64_t panels;                 /* of one group */
  int lanes, acc_bits, psum_bits, guard_bits;
  bool saturate;
  int64_t bins;
  int64_t bin_stride; /* integers of 32 bits that an accumulator with bins takes */
  std::vector<int64_t> constants, code_shift;
  std::vector<int32_t> code_shift32; /* limited to what decides, and row_words more entries */
  RawCode raw;
  const Isa* isa = nullptr;

  /* many rows of narrow activations: every term of a weight is laid out, so that a product is one load */
  bool expands = false;
  Kernel expanded;
  int64_t expanded_step; /* the depth of a block */
  int64_t expanded_panels;
  std::vector<uint16_t> activation_rows; /* by word: where its terms begin, in bytes */
  /* shifted: terms of an octave are those of the highest one, shifted */
  bool shifts = false;
  int64_t gamma;                           /* codes of an octave */
  std::vector<uint32_t> activation_shifts; /* by word: where its terms begin, and by how much they are shifted */
  Buffer<uint64_t> weight_planes;          /* [group][panel][words of depth][positive and negative][panel width] */
  Buffer<int16_t> weight_codes;            /* [group][panel][depth][panel width], signed */
  std::vector<int32_t> expanded_start;
  Buffer<int32_t> term_stream; /* terms by code sum, then zeros; zeros alone from zero_stream on */
  int64_t zero_stream;

  int acc_size;        /* bytes of an accumulator */
  int activation_size; /* bytes of a packed activation */
  /* what each activation word is packed as */
  std::vector<float> activation_floats;
  std::vector<double> activation_doubles;
  std::vector<int32_t> activation_ints;
  std::vector<int64_t> activation_longs; /* general: twice the code, plus the sign; bins, log8, log16: as made there */
  /* packed weights: [group][panel][depth][panel width] */
  Buffer<float> weight_floats;
  Buffer<double> weight_doubles;
  Buffer<int32_t> weight_ints;
  Buffer<char> weight_lanes; /* log8, log16: see pack_narrow */

  /* fp32: add to the bits and mask them to round the product's significand */
  int32_t round_add, round_mask;
  int64_t wide_round_add, wide_round_mask; /* the same for fp64 */
  /* gather and bins: terms by packed sum; with bins, bin_stride integers each */
  Buffer<int32_t> table;
  Buffer<char> weight_records; /* bins: see pack_bins */
  int64_t bin_block = 0;       /* depth of a block of entries, see bin_entries */
  alignas(64) double bin_constants[16] = {};
  bool short_records = false;
  /* Saturating sums that provably stay in range are added without clamping: over a block of depth, terms are at most
   * the sum of the activations' bounds times the largest weight's (see bound_terms). */
  bool bounded = false;
  int64_t bound_depth = 0;              /* a multiple of lanes */
  std::vector<float> activation_bounds; /* by code; where packed activations are floats, they are their own */
  Buffer<float> weight_bounds;          /* [group][panel][blocks of bound_depth] */
  int32_t limit, step_limit;            /* saturating: the accumulator's and a step's; −1 if steps change nothing */
  double wide_limit, wide_step_limit;   /* the same where sums are kept in float64 */
  /* bins and gather: initial value of the accumulators, [channels] or empty */
  std::vector<int32_t> start32;
  std::vector<double> start64;
  std::vector<int64_t> start_wide;
  /* log: Δ⁺ and −Δ⁻ by d >> delta_shift, [2, delta_size], the last entry 0 */
  Buffer<int32_t> delta;
  int64_t delta_size;
  int delta_shift;
  int8_t delta8[2][64];
  Buffer<int16_t> delta16_memory;  /* one more entry at either end */
  const int16_t* delta16;          /* [2, delta_size] */
  int64_t delta_used;              /* entries up to the first of the last zeros */
  int32_t largest;                 /* Λ */
  std::vector<int32_t> start_code; /* log: codes, no_code for zero; negative is in start_minus */
  std::vector<int32_t> start_minus;
  /* general: terms [bins, columns], the bin of each column (-1: none, -2: several), weights as activation_longs */
  std::vector<int64_t> terms;
  std::vector<int32_t> bin_of;
  int64_t term_columns;
  std::vector<int64_t> entry_shift, weight_longs;

  explicit Layer(lns_output o) : output(o) {}
};

/* Expanded terms: codes 0 … 127 and, 128 further, the same with the other sign. */
constexpr int64_t expanded_codes = 128;
/* Memory for the terms of a block of expanded or shifted weights, whatever the instruction set. */
constexpr int64_t terms_bytes = int64_t{1} << 17;
/* Depth of a block of expanded weights. */
constexpr int64_t expanded_depth = 4;
/* Columns of a panel of bins, whatever the instruction set. */
constexpr int bins_panel = 8;
/* Shifted terms: codes of an octave, at most, and the depth of a block. */
constexpr int64_t shifted_gamma = 16, shifted_depth = 8;

/* A zero in log kernels: below every code, and so far below that Δ is 0 for its distance. */
constexpr int32_t no_code = -(1 << 29);

/* ---- threads --------------------------------------------------------------------------------------------- */

/* Run body(i) for i in 0 … count − 1, on at most `threads` threads, the caller among them. The first failure of any
 * is thrown again here. */
void parallel(int64_t count, int threads, const std::function<void(int64_t)>& body);

/* Counts of a task joined to those of the call, if it wants any. */
void add_to(lns_counts* counts, const lns_counts& found, std::mutex& mutex);

const Isa& current_isa();

template <class Body>
int32_t guarded(lns_error* error, Body body) noexcept;
int32_t report(lns_error* error, int32_t status, const char* message) noexcept;

template <class Body>
int32_t guarded(lns_error* error, Body body) noexcept {
  try {
    body();
    return LNS_OK;
  } catch (const Failure& f) {
    return report(error, f.status, f.message.c_str());
  } catch (const std::bad_alloc&) {
    return report(error, LNS_NO_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return report(error, LNS_INTERNAL, e.what());
  } catch (...) {
    return report(error, LNS_INTERNAL, "unknown failure");
  }
}

}  // namespace lns
#endif
