/* What kernels are given: one struct a launch, passed by value. lnsdeploy/emulator/cuda.py has the same structs in
 * ctypes and compares their sizes and the order of their fields with this text (tests/test_cuda.py). Pointers are
 * device memory; strides count elements. */
#ifndef LNS_PARAMS_H
#define LNS_PARAMS_H

#include "stages.h"

namespace lns {
using namespace stages;

/* One side of a product, or any tensor of words. */
struct Words {
  const void* data;
  i32 bytes;    /* 1 or 2 */
  u32 code;     /* mask of the code's bits */
  u32 sign_bit; /* 0 if unsigned */
  i32 widen;    /* spec 3.2 */
};

/* Where result words go (spec 2.4). */
struct Result {
  void* data;
  i64 max_code;
  i32 bytes;
  u32 sign_bit;
  u32 least; /* what is below code 1 */
  i32 unused;
  u64* counts; /* saturated, flushed, saturated_negative: added to */
};

/* The log adder in 64 bits (spec 5). */
struct Adder {
  const i32* plus;
  const i32* minus;
  i64 plus_count, minus_count;
  i64 largest;
  i32 guard;
  i32 lanes;
};

/* Windows over three axes, the last ones of a tensor [outer, size...] (spec 6, 7). */
struct Window {
  i64 size[3], out[3];
  i64 kernel[3], strides[3], begins[3], dilations[3];
};

/* Dot products (spec 3, 4, 5, 7): out[z][m][n] = Σ_k a[z][m][k] · w[z][n][k]. An element of `a` lies at
 * rows[m] + depths[k], so a convolution is a product whose tables walk a padded image. */
struct Product {
  Words a, w;
  Result out;
  const i32* rows;     /* [m] */
  const i32* depths;   /* [k] */
  const i32* out_rows; /* [m] */
  i64 a_group, w_group, out_group; /* strides of z */
  i64 w_channel, w_depth, out_channel;
  i64 m, n, k;
  i64 first_group; /* of this launch */

  const i64* bias;        /* [z, n]: accumulator's first value; log: sign · 2^acc_bits + code */
  const i64* code_shift;  /* [z, n] (spec 4.6, 5.6) */
  const i64* entry_shift; /* [z, n] (spec 5.1) */

  /* raw codes of linear accumulation */
  const u64* thresholds;
  const i32* starts;
  i32 start_bits;
  i32 acc_bits, psum_bits;
  i32 lanes;
  i32 saturate;
  i32 bins;
  const i64* constants; /* [bins] */

  const void* table;  /* see the kernel */
  const void* table2;
  i64 table_entries;
  i64 term_columns;   /* general: terms [bins, columns] */
  i32 numbers[8];     /* see the kernel */
  const void* a_values; /* by word: what a kernel computes with, where it is no simple sum */
  const void* w_values;
  Adder adder;
};

/* Words to words, or to float32, or back, element by element. */
struct Map {
  Words x;
  Result out;
  i64 count;
  const void* table;  /* see the kernel */
  const void* table2;
  i64 table_entries;
  i32 numbers[4];
};

/* Element-wise sum (spec 6.4) of operands that broadcast. */
struct Sum {
  Words a, b;
  Result out;
  Adder adder;
  i64 a_shift, b_shift, code_shift;
  i64 count;
  i32 rank;
  i32 unused;
  i64 shape[8], a_strides[8], b_strides[8];
};

/* Pooling (spec 6.1, 6.5). */
struct Pool {
  Words x;
  Result out;
  Adder adder;
  Window window;
  i64 outer;
  i64 input_shift, code_shift;
  const i64* log_counts; /* [log_shape] */
  i64 log_shape[3];      /* each 1 or the output's size */
};

/* Copies words into a padded image: out[outer][padded...] = x[outer][size...], zero words around. */
struct Pad {
  const void* x;
  void* out;
  i64 outer;
  i64 size[3], padded[3], begins[3];
  i32 bytes;
  i32 unused;
};

}  // namespace lns
#endif
