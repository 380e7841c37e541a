/* The native library's C interface: what the cpu executor calls through ctypes, and the ONNX Runtime operators
 * directly. Paragraphs cited as "spec N.N" are those of docs/datapath.md.
 *
 * Words are uint8 where a format has at most 8 bits, else uint16; formats have 2 to 16 bits. Nothing here trusts a
 * word: a sign with code 0 is read as zero, and bits above the format's width are ignored.
 *
 * Functions return 0, or write a message into `error` (always terminated) and return one of lns_status. Nothing
 * throws across this interface, and no result depends on the number of threads or the instruction set.
 */
#ifndef LNSDEPLOY_H
#define LNSDEPLOY_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LNS_API __declspec(dllexport)
#else
#define LNS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LNS_ABI 4

enum lns_status {
  LNS_OK = 0,
  LNS_BAD_VALUE = 1, /* an argument is out of its range, shapes do not fit */
  LNS_NO_MEMORY = 2,
  LNS_UNSUPPORTED = 3, /* meaningful, but beyond this library's integers */
  LNS_INTERNAL = 4,
};

enum lns_isa { LNS_ISA_AUTO = -1, LNS_ISA_PORTABLE = 0, LNS_ISA_AVX2 = 1, LNS_ISA_AVX512 = 2, LNS_ISA_NEON = 3 };

/* Where messages go; `text` may be null. */
typedef struct lns_error {
  char* text;
  size_t size;
} lns_error;

/* What _output counted (spec 2.4): results in all, above the largest code, below code 1, and negative ones of those
 * above. Every function that takes counts adds to them; null counts nothing. */
typedef struct lns_counts {
  int64_t total, saturated, flushed, saturated_negative;
} lns_counts;

typedef struct lns_format {
  int32_t bits;      /* 2 to 16 */
  int32_t is_signed; /* 0 or 1 */
} lns_format;

typedef struct lns_output {
  lns_format format;
  int32_t underflow_min; /* 1: results below code 1 become code 1 (spec 2.4) */
} lns_output;

LNS_API int32_t lns_abi(void);
/* The instruction set in use: what the machine has, or what lns_force_isa chose. */
LNS_API int32_t lns_isa_in_use(void);
/* Whether this machine and build can use an instruction set. */
LNS_API int32_t lns_isa_available(int32_t isa);
/* Choose the instruction set of everything that is created from now on; LNS_ISA_AUTO undoes it. */
LNS_API int32_t lns_force_isa(int32_t isa, lns_error* error);

/* ------------------------------------------------------------------------------------------------------------
 * Dot products (spec 3, 4, 5, 7). */

typedef struct lns_dot lns_dot;

/* A layer: everything but the activations. All arrays are read during lns_dot_create only. */
typedef struct lns_dot_desc {
  int32_t log; /* 0: linear accumulation (spec 4), 1: log accumulation (spec 5) */
  lns_format activation, weight;
  int64_t activation_widen, weight_widen; /* spec 3.2; >= 1 */
  lns_output output;
  int64_t groups;           /* of a convolution; 1 for a matrix product */
  int64_t channels;         /* output channels of all groups, a multiple of groups */
  int64_t depth;            /* K, of one group */
  const void* weight_words; /* [channels, depth], contiguous, uint8 or uint16 by weight.bits */

  int32_t lanes;    /* 1 to 1024 */
  int32_t acc_bits; /* linear: 2 to 62; log: 1 to 40 */

  /* linear accumulation */
  int32_t psum_bits;         /* 2 to 62 */
  int32_t saturate;          /* 0 or 1 */
  const void* terms;         /* [bins, term_columns]: aligned magnitude by bin and code sum (spec 4.1 to 4.3) */
  int32_t terms_are_64;      /* int64 rather than int32 */
  int64_t bins;              /* >= 1 */
  int64_t term_columns;      /* the largest code sum + 1, exactly */
  const int64_t* constants;  /* [bins] (spec 4.6) */
  const int64_t* thresholds; /* sorted, >= 1 (spec 4.6) */
  int64_t threshold_count;

  /* log accumulation */
  int32_t guard_bits; /* 0 to 8 */
  const int32_t* delta_plus;
  int64_t delta_plus_count;
  const int32_t* delta_minus;
  int64_t delta_minus_count;
  const int64_t* entry_shift; /* [channels] (spec 5.1) */

  const int64_t* bias;       /* [channels], or null: linear spec 4.5, log spec 5.5 */
  const int64_t* code_shift; /* [channels] (spec 4.6, 5.6) */
} lns_dot_desc;

/* Check a layer and pack its weights. */
LNS_API int32_t lns_dot_create(const lns_dot_desc* desc, lns_dot** out, lns_error* error);
LNS_API void lns_dot_destroy(lns_dot* dot);
/* The kernel that was chosen, for people and tests: "fp32", "gather", "general", ...; valid while the layer is. */
LNS_API const char* lns_dot_kernel(const lns_dot* dot);

/* words [rows, channels] from activations [rows, depth] (groups = 1).
 * Strides are in elements; the output is contiguous. threads >= 1. */
LNS_API int32_t lns_dot_run(const lns_dot* dot, const void* activations, int64_t rows, int64_t row_stride,
                            int64_t column_stride, void* output, int32_t threads, lns_counts* counts, lns_error* error);

/* Geometry of windows: always three spatial axes, leading ones for fewer. */
typedef struct lns_window {
  int64_t kernel[3], strides[3], pads[6], dilations[3]; /* pads: beginnings, then ends */
} lns_window;

/* Output sizes [3] for input sizes [3]; LNS_BAD_VALUE if the window does not fit. */
LNS_API int32_t lns_window_output(const lns_window* window, const int64_t* input, int64_t* output, lns_error* error);

/* Convolution: x [batch, groups * C, size...], contiguous; y [batch, channels, output size...], where
 * depth = C * kernel volume. */
LNS_API int32_t lns_conv_run(const lns_dot* dot, const lns_window* window, const void* x, int64_t batch,
                             const int64_t* size, void* y, int32_t threads, lns_counts* counts, lns_error* error);

/* ------------------------------------------------------------------------------------------------------------
 * Other operations. Arrays are contiguous unless strides are given. */

/* spec 2.1, 2.4: code = how many of the sorted thresholds the magnitude reaches. NaN becomes zero; a negative number
 * into an unsigned format is taken as 0. thresholds: [2^(bits - signed) - 1]. */
LNS_API int32_t lns_encode(const float* x, int64_t count, const float* thresholds, int64_t threshold_count,
                           lns_format format, void* words, int32_t threads, lns_error* error);
/* spec 2.1, 2.4 for any offset, or one a channel: x [channels, inner]. A number's code is that of its octave, found by
 * its significand's bits alone, less the offset; so one small table serves every offset.
 * thresholds: [gamma], sorted, 0 to 2^23: mantissas from which on a number rounds to the next code of its octave; gamma
 * is 1 to 2^14. NaN becomes zero, infinity the largest code; a negative number into an unsigned format is taken as 0.
 * histogram: [2^bits], how often each word came, added to what is there; or null. */
LNS_API int32_t lns_encode_channels(const float* x, int64_t channels, int64_t inner, int64_t gamma,
                                    const int32_t* thresholds, const int64_t* offsets, lns_output output, void* words,
                                    int64_t* histogram, int32_t threads, lns_error* error);
/* Values of words without the words, for training: y = decode(encode(x)) in float32 (spec 2.1, 2.4, 2.5), x and y
 * [channels, inner]. A magnitude's bits, shifted right by `drop`, less `first`, are its bucket; bounds [buckets] are
 * the largest bits below the threshold in each, values [buckets + 1] the bits of the value below it, and of the next
 * one. low and high, [1] or [channels] by `limits`, are bits of the least and largest magnitude that has a code of its
 * own, and lie in the first and last bucket or between. least: underflow gives the least magnitude, else zero.
 * LNS_BAD_VALUE if x has NaN. */
LNS_API int32_t lns_round_floats(const float* x, int64_t channels, int64_t inner, int32_t drop, int32_t first,
                                 const int32_t* bounds, const int32_t* values, int64_t buckets, const int32_t* low,
                                 const int32_t* high, int64_t limits, int32_t is_signed, int32_t least, float* y,
                                 int32_t threads, lns_error* error);
/* The largest magnitude of each of x [channels, inner]; NaN or infinity where there is one. */
LNS_API int32_t lns_largest(const float* x, int64_t channels, int64_t inner, float* y, int32_t threads,
                            lns_error* error);
/* The largest magnitude of each channel's partial sums, peak [channels], over the rows of a [rows, depth] times
 * w [depth, channels], for placing accumulators. Operands are codes with the sign of their value; a product of codes p
 * and q adds values [columns] at |p| + |q| to the sum of bin bins_of [columns] there (one bin if that is null). Sums
 * start at start [channels] in bin 0. */
LNS_API int32_t lns_largest_sums(int64_t rows, int64_t depth, int64_t channels, int64_t bins, int64_t columns,
                                 const double* values, const uint8_t* bins_of, const int32_t* a, const int32_t* w,
                                 const double* start, double* peak, int32_t threads, lns_error* error);
/* Madam, the first half of a step: x = clamp(rate * g / sqrt(max(v, least)) * sign w, +-bound). */
LNS_API int32_t lns_madam_octaves(int64_t count, const float* w, const float* g, const float* v, float least,
                                  float rate, float bound, float* x, int32_t threads, lns_error* error);
/* The second: y = w * x with magnitudes from low to high ([1] or [count] each, by `bounds`). Zeros wake against g, or
 * along it (ascend); magnitudes that fall below low change sign (flip). clipped: how many reach high. */
LNS_API int32_t lns_madam_move(int64_t count, const float* w, const float* g, const float* x, const float* low,
                               const float* high, int64_t bounds, int32_t flip, int32_t ascend, float* y,
                               int64_t* clipped, int32_t threads, lns_error* error);
/* IntegerMadam and LNSMadam: signed codes of `bits` bits less round(clamp(rate * g / sqrt(max(v, least)), +-bound)), or
 * with random bytes less floor((that + byte) / 256); y: table[base + code], signed, of codes rounded to nearest
 * multiples of 2^drop. bases: [1] or [count]. */
LNS_API int32_t lns_madam_codes(int64_t count, int16_t* codes, const float* g, const float* v, float least, float rate,
                                float bound, int32_t flip, int32_t ascend, const uint8_t* random, int32_t bits,
                                int32_t drop, const float* table, int64_t table_count, const int64_t* bases,
                                int64_t bases_count, float* y, int64_t* clipped, int32_t threads, lns_error* error);
/* spec 2.3: bytes start ... start + count - 1 of a stream. */
LNS_API int32_t lns_random_bytes(uint64_t seed, uint64_t stream, uint64_t start, int64_t count, uint8_t* bytes,
                                 int32_t threads, lns_error* error);
/* How often each word of `bits` bits comes (1 to 16; further bits are ignored): histogram [2^bits], added to what is
 * there. */
LNS_API int32_t lns_histogram(const void* words, int32_t bytes, int64_t count, int32_t bits, int64_t* histogram,
                              int32_t threads, lns_error* error);
/* spec 2.5: values from a table [2^bits]. Words are uint8 (bytes = 1) or uint16 (bytes = 2); one outside the table
 * takes its low bits. */
LNS_API int32_t lns_decode(const void* words, int32_t bytes, int64_t count, const float* table, int64_t table_count,
                           float* x, int32_t threads, lns_error* error);
/* spec 6.1 */
LNS_API int32_t lns_relu(const void* x, int64_t count, lns_format format, void* y, int32_t threads, lns_error* error);
/* spec 6.1; limits are signed codes, low <= high. */
LNS_API int32_t lns_clip(const void* x, int64_t count, lns_format format, int64_t low, int64_t high, void* y,
                         int32_t threads, lns_error* error);
/* spec 6.1: x [outer, size...] to y [outer, output size...]. */
LNS_API int32_t lns_max_pool(const void* x, int64_t outer, const int64_t* size, lns_format format,
                             const lns_window* window, void* y, int32_t threads, lns_error* error);

/* spec 6.3 */
typedef struct lns_rescale_desc {
  lns_format input;
  int64_t input_offset, multiply, divide, output_offset; /* multiply, divide: 1 to 2^24, one of them 1 */
  lns_output output;
} lns_rescale_desc;
LNS_API int32_t lns_rescale(const lns_rescale_desc* desc, const void* x, int64_t count, void* y, int32_t threads,
                            lns_counts* counts, lns_error* error);

/* The log adder of spec 6.4 and 6.5. */
typedef struct lns_adder {
  int32_t acc_bits, guard_bits; /* 1 to 40, 0 to 8 */
  const int32_t* delta_plus;
  int64_t delta_plus_count;
  const int32_t* delta_minus;
  int64_t delta_minus_count;
} lns_adder;

/* spec 6.4: y[shape] = a + b; strides in elements, 0 where an operand is broadcast; rank 0 to 8. */
typedef struct lns_add_desc {
  lns_adder adder;
  lns_format a, b;
  int64_t a_shift, b_shift; /* operand's offset less the accumulator's */
  int64_t code_shift;       /* o_acc - o_out */
  lns_output output;
} lns_add_desc;
LNS_API int32_t lns_add(const lns_add_desc* desc, int32_t rank, const int64_t* shape, const void* a,
                        const int64_t* a_strides, const void* b, const int64_t* b_strides, void* y, int32_t threads,
                        lns_counts* counts, lns_error* error);

/* spec 6.5: x [outer, size...] to y [outer, output size...]. */
typedef struct lns_average_desc {
  lns_adder adder;
  lns_format input;
  int64_t input_shift, code_shift;
  int32_t lanes;
  lns_output output;
  const int64_t* log_counts;  /* round(gamma_acc * log2 n), [log_count_shape] */
  int64_t log_count_shape[3]; /* each 1 or the output's size */
} lns_average_desc;
LNS_API int32_t lns_average_pool(const lns_average_desc* desc, const void* x, int64_t outer, const int64_t* size,
                                 const lns_window* window, void* y, int32_t threads, lns_counts* counts,
                                 lns_error* error);

#ifdef __cplusplus
}
#endif
#endif
