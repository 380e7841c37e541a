// SPDX-License-Identifier: Apache-2.0
//
// Element-wise sum of two words (6.4): both enter the adder's scale, one addition, and out again.

module lns_add_words #(
    parameter int A_BITS      = 8,
    parameter int A_SIGNED    = 1,
    parameter int B_BITS      = 8,
    parameter int B_SIGNED    = 1,
    parameter int OUT_BITS    = 8,
    parameter int OUT_SIGNED  = 1,
    parameter int UNDERFLOW   = lns_pkg::UnderflowZero,
    parameter int ACC_BITS    = 10,
    parameter int GUARD       = 2,
    parameter int SCALE_BITS  = 10,
    parameter int OFFSET_BITS = 10,
    parameter int DELTA_BITS  = 4,
    parameter int DELTA       = 1
) (
    input  logic        [A_BITS-1:0]      a_i,
    input  logic        [B_BITS-1:0]      b_i,
    input  logic signed [SCALE_BITS-1:0]  a_scale_i,  // o_a - o_acc
    input  logic signed [SCALE_BITS-1:0]  b_scale_i,  // o_b - o_acc
    input  logic signed [OFFSET_BITS-1:0] offset_i,   // o_acc - o_out
    output logic        [OUT_BITS-1:0]    y_o
);

  // Do not change: follow from the parameters.
  localparam int ACodeBits = A_BITS - A_SIGNED;
  localparam int BCodeBits = B_BITS - B_SIGNED;

  logic [ACC_BITS-1:0] a_code, b_code;
  logic [ACC_BITS:0] sum;

  lns_enter #(
      .CODE_BITS(ACodeBits),
      .SCALE_BITS(SCALE_BITS),
      .GUARD(GUARD),
      .ACC_BITS(ACC_BITS)
  ) i_enter_a (
      .code_i(a_i[ACodeBits-1:0]),
      .zero_i(a_i[ACodeBits-1:0] == '0),
      .scale_i(a_scale_i),
      .code_o(a_code)
  );
  lns_enter #(
      .CODE_BITS(BCodeBits),
      .SCALE_BITS(SCALE_BITS),
      .GUARD(GUARD),
      .ACC_BITS(ACC_BITS)
  ) i_enter_b (
      .code_i(b_i[BCodeBits-1:0]),
      .zero_i(b_i[BCodeBits-1:0] == '0),
      .scale_i(b_scale_i),
      .code_o(b_code)
  );
  lns_add #(
      .BITS(ACC_BITS),
      .DELTA_BITS(DELTA_BITS),
      .DELTA(DELTA)
  ) i_add (
      .x_sign_i((A_SIGNED != 0) & a_i[A_BITS-1]),
      .x_code_i(a_code),
      .y_sign_i((B_SIGNED != 0) & b_i[B_BITS-1]),
      .y_code_i(b_code),
      .sign_o(sum[ACC_BITS]),
      .code_o(sum[ACC_BITS-1:0])
  );
  lns_log_finish #(
      .ACC_BITS(ACC_BITS),
      .GUARD(GUARD),
      .OFFSET_BITS(OFFSET_BITS),
      .OUT_BITS(OUT_BITS),
      .OUT_SIGNED(OUT_SIGNED),
      .UNDERFLOW(UNDERFLOW)
  ) i_finish (
      .acc_i(sum),
      .offset_i(offset_i),
      .word_o(y_o)
  );

endmodule
