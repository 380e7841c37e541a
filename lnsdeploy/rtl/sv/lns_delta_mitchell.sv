// SPDX-License-Identifier: Apache-2.0
//
// Delta by Mitchell's antilogarithm (5.7.5), the same for sums and differences: no table. GAMMA is the accumulator's;
// where it is a power of two, quotient and remainder are wires.

module lns_delta_mitchell #(
    parameter int D_BITS = 7,
    parameter int V_BITS = 4,
    parameter int GAMMA  = 8
) (
    input  logic [D_BITS-1:0] d_i,
    output logic [V_BITS-1:0] delta_o
);

  // Do not change: follows from the parameters.
  localparam int Wide = lns_pkg::larger(D_BITS, $clog2(GAMMA) + 2) + 1;

  logic [Wide-1:0] quotient, remainder;

  assign quotient  = Wide'(d_i) / Wide'(GAMMA);
  assign remainder = Wide'(d_i) % Wide'(GAMMA);
  assign delta_o   = V_BITS'((Wide'(2 * GAMMA) - remainder) >> (quotient + 1));

endmodule
