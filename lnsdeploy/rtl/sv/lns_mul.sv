// SPDX-License-Identifier: Apache-2.0
//
// Word multiplier (3.1, 3.2): signs by exclusive or, codes by addition, zero if either is zero.
// Operands of a smaller gamma are widened first, by A_SCALE or W_SCALE.

module lns_mul #(
    parameter int A_BITS   = 8,
    parameter int A_SIGNED = 1,
    parameter int A_SCALE  = 1,
    parameter int W_BITS   = 8,
    parameter int W_SIGNED = 1,
    parameter int W_SCALE  = 1,
    parameter int P_BITS   = 8   // of the largest sum of widened codes
) (
    input  logic [A_BITS-1:0] a_i,
    input  logic [W_BITS-1:0] w_i,
    output logic              sign_o,
    output logic              zero_o,
    output logic [P_BITS-1:0] code_o
);

  // Do not change: follow from the parameters.
  localparam int ACodeBits = A_BITS - A_SIGNED;
  localparam int WCodeBits = W_BITS - W_SIGNED;

  logic [ACodeBits-1:0] a_code;
  logic [WCodeBits-1:0] w_code;
  logic a_sign, w_sign;

  assign a_code = a_i[ACodeBits-1:0];
  assign w_code = w_i[WCodeBits-1:0];
  assign a_sign = (A_SIGNED != 0) & a_i[A_BITS-1];
  assign w_sign = (W_SIGNED != 0) & w_i[W_BITS-1];

  assign zero_o = (a_code == '0) | (w_code == '0);
  assign sign_o = a_sign ^ w_sign;
  assign code_o = P_BITS'(a_code) * P_BITS'(A_SCALE) + P_BITS'(w_code) * P_BITS'(W_SCALE);

endmodule
