// SPDX-License-Identifier: Apache-2.0
//
// Negative words become zero (6.1).

module lns_relu #(
    parameter int BITS = 8
) (
    input  logic [BITS-1:0] a_i,
    output logic [BITS-1:0] y_o
);

  assign y_o = a_i[BITS-1] ? '0 : a_i;

endmodule
