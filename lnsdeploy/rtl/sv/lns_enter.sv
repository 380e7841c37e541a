// SPDX-License-Identifier: Apache-2.0
//
// A code into the log accumulator's scale (5.1): shifted by an offset, guard bits appended, limited to its range.

module lns_enter #(
    parameter int CODE_BITS  = 8,
    parameter int SCALE_BITS = 10,
    parameter int GUARD      = 0,
    parameter int ACC_BITS   = 7
) (
    input  logic        [CODE_BITS-1:0]  code_i,
    input  logic                         zero_i,
    input  logic signed [SCALE_BITS-1:0] scale_i,
    output logic        [ACC_BITS-1:0]   code_o
);

  // Do not change: follows from the parameters.
  localparam int Wide = lns_pkg::larger(lns_pkg::larger(CODE_BITS, SCALE_BITS) + GUARD, ACC_BITS) + 3;

  logic signed [Wide-1:0] scaled, most;

  assign scaled = ($signed(Wide'(code_i)) + Wide'(scale_i)) <<< GUARD;
  assign most   = $signed({{(Wide - ACC_BITS) {1'b0}}, {ACC_BITS{1'b1}}});
  assign code_o = (zero_i || scaled < 1) ? '0 : (scaled > most) ? '1 : scaled[ACC_BITS-1:0];

endmodule
