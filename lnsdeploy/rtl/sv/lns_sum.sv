// SPDX-License-Identifier: Apache-2.0
//
// Exact sum of N signed integers as a balanced tree of adders, one bit wider a level (4.4).

module lns_sum #(
    parameter int N        = 4,
    parameter int IN_BITS  = 25,
    parameter int OUT_BITS = IN_BITS + $clog2(N)
) (
    input  logic        [N*IN_BITS-1:0] values_i,
    output logic signed [OUT_BITS-1:0]  sum_o
);

  generate
    if (N == 1) begin : gen_leaf
      assign sum_o = OUT_BITS'($signed(values_i));
    end else begin : gen_node
      // Do not change: follow from the parameters.
      localparam int Left = 1 << ($clog2(N) - 1);
      localparam int Right = N - Left;
      logic signed [OUT_BITS-1:0] left, right;
      lns_sum #(
          .N(Left),
          .IN_BITS(IN_BITS),
          .OUT_BITS(OUT_BITS)
      ) i_left (
          .values_i(values_i[Left*IN_BITS-1:0]),
          .sum_o(left)
      );
      lns_sum #(
          .N(Right),
          .IN_BITS(IN_BITS),
          .OUT_BITS(OUT_BITS)
      ) i_right (
          .values_i(values_i[N*IN_BITS-1:Left*IN_BITS]),
          .sum_o(right)
      );
      assign sum_o = left + right;
    end
  endgenerate

endmodule
