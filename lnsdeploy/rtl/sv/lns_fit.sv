// SPDX-License-Identifier: Apache-2.0
//
// Fit a signed integer to a width (4.4): wrap to two's complement, or clamp to +-(2^(OUT_BITS-1) - 1).

module lns_fit #(
    parameter int IN_BITS  = 25,
    parameter int OUT_BITS = 24,
    parameter int OVERFLOW = lns_pkg::OverflowSaturate
) (
    input  logic signed [IN_BITS-1:0]  value_i,
    output logic signed [OUT_BITS-1:0] value_o
);

  // Do not change: follows from the parameters.
  localparam int Wide = ((IN_BITS > OUT_BITS) ? IN_BITS : OUT_BITS) + 1;

  logic signed [Wide-1:0] wide;
  assign wide = Wide'(value_i);

  generate
    if (OVERFLOW == lns_pkg::OverflowSaturate) begin : gen_saturate
      logic signed [Wide-1:0] limit;
      assign limit   = $signed({{(Wide - OUT_BITS + 1) {1'b0}}, {(OUT_BITS - 1) {1'b1}}});
      assign value_o = (wide > limit) ? limit[OUT_BITS-1:0] : (wide < -limit) ? -limit[OUT_BITS-1:0] : wide[OUT_BITS-1:0];
    end else begin : gen_wrap
      assign value_o = wide[OUT_BITS-1:0];
    end
  endgenerate

endmodule
