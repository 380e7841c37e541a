// SPDX-License-Identifier: Apache-2.0
//
// Delta by shifts of a constant, gamma * log2 e (5.7.6), the same for sums and differences.

module lns_delta_shift #(
    parameter int D_BITS   = 7,
    parameter int V_BITS   = 4,
    parameter int GAMMA    = 8,
    parameter int CONSTANT = 12
) (
    input  logic [D_BITS-1:0] d_i,
    output logic [V_BITS-1:0] delta_o
);

  // Do not change: follows from the parameters.
  localparam int Wide = lns_pkg::larger(D_BITS, $clog2(GAMMA) + 1);

  logic [Wide-1:0] quotient;

  assign quotient = Wide'(d_i) / Wide'(GAMMA);
  assign delta_o  = V_BITS'(CONSTANT) >> quotient;

endmodule
