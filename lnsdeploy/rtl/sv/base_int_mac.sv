// SPDX-License-Identifier: Apache-2.0
//
// Baseline: LANES integer products a clock, summed into a wrapping two's complement accumulator.

module base_int_mac #(
    parameter int BITS     = 8,
    parameter int ACC_BITS = 24,
    parameter int LANES    = 1
) (
    input  logic                              clk_i,
    input  logic                              rst_ni,
    input  logic                              valid_i,
    input  logic        [LANES*BITS-1:0]      a_i,
    input  logic        [LANES*BITS-1:0]      w_i,
    output logic signed [ACC_BITS-1:0]        acc_o
);

  // Do not change: follow from the parameters.
  localparam int SumBits = 2 * BITS + $clog2(LANES);

  logic [LANES*2*BITS-1:0] products;
  logic signed [SumBits-1:0] sum;

  genvar l;
  generate
    for (l = 0; l < LANES; l = l + 1) begin : gen_lane
      logic signed [2*BITS-1:0] a, w;
      assign a = (2 * BITS)'($signed(a_i[l*BITS+:BITS]));
      assign w = (2 * BITS)'($signed(w_i[l*BITS+:BITS]));
      assign products[l*2*BITS+:2*BITS] = a * w;
    end
  endgenerate

  lns_sum #(
      .N(LANES),
      .IN_BITS(2 * BITS),
      .OUT_BITS(SumBits)
  ) i_sum (
      .values_i(products),
      .sum_o(sum)
  );

  always_ff @(posedge clk_i) begin
    if (!rst_ni) acc_o <= '0;
    else if (valid_i) acc_o <= acc_o + ACC_BITS'(sum);
  end

endmodule
