// SPDX-License-Identifier: Apache-2.0
//
// The larger or the smaller of two words that share an offset, by value (6.1).

module lns_compare #(
    parameter int BITS      = 8,
    parameter int IS_SIGNED = 1,
    parameter int SMALLER   = 0
) (
    input  logic [BITS-1:0] a_i,
    input  logic [BITS-1:0] b_i,
    output logic [BITS-1:0] y_o
);

  // Do not change: follows from the parameters.
  localparam int CodeBits = BITS - IS_SIGNED;

  logic signed [BITS:0] a, b;
  logic a_taken;
  logic [BITS-1:0] taken;

  assign a = ((IS_SIGNED != 0) & a_i[BITS-1]) ? -$signed((BITS + 1)'(a_i[CodeBits-1:0])) : $signed((BITS + 1)'(a_i[CodeBits-1:0]));
  assign b = ((IS_SIGNED != 0) & b_i[BITS-1]) ? -$signed((BITS + 1)'(b_i[CodeBits-1:0])) : $signed((BITS + 1)'(b_i[CodeBits-1:0]));

  assign a_taken = (SMALLER != 0) ? a <= b : a >= b;
  assign taken   = a_taken ? a_i : b_i;
  // zero has one word only (1.2)
  assign y_o     = (taken[CodeBits-1:0] == '0) ? '0 : taken;

endmodule
