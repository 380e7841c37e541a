// SPDX-License-Identifier: Apache-2.0
//
// LNS adder (5.2, 5.3): the larger code plus or minus Gaussian logarithms of the difference, limited to 1 .. 2^BITS - 1.
// Zero is the identity; equal codes of different sign give zero.

module lns_add #(
    parameter int BITS       = 7,
    parameter int DELTA_BITS = 4,  // of the largest entry of either table
    parameter int DELTA      = 0   // which of the generated lns_delta
) (
    input  logic            x_sign_i,
    input  logic [BITS-1:0] x_code_i,
    input  logic            y_sign_i,
    input  logic [BITS-1:0] y_code_i,
    output logic            sign_o,
    output logic [BITS-1:0] code_o
);

  // Do not change: follows from the parameters.
  localparam int Wide = lns_pkg::larger(BITS, DELTA_BITS) + 2;

  logic x_larger, differ;
  logic [BITS-1:0] upper, lower, d;
  logic [DELTA_BITS-1:0] delta;
  logic signed [Wide-1:0] base, change, total, most;

  assign x_larger = x_code_i >= y_code_i;
  assign upper    = x_larger ? x_code_i : y_code_i;
  assign lower    = x_larger ? y_code_i : x_code_i;
  assign d        = upper - lower;
  assign differ   = x_sign_i ^ y_sign_i;

  lns_delta #(
      .ID(DELTA),
      .D_BITS(BITS),
      .V_BITS(DELTA_BITS)
  ) i_delta (
      .minus_i(differ),
      .d_i(d),
      .delta_o(delta)
  );

  assign base   = $signed(Wide'(upper));
  assign change = $signed(Wide'(delta));
  assign total  = differ ? base - change : base + change;
  assign most   = $signed({{(Wide - BITS) {1'b0}}, {BITS{1'b1}}});

  always_comb begin
    if (lower == '0) code_o = upper;
    else if ((differ && d == '0) || total < 1) code_o = '0;
    else if (total > most) code_o = '1;
    else code_o = total[BITS-1:0];
  end

  assign sign_o = (x_larger ? x_sign_i : y_sign_i) & (code_o != '0);

endmodule
