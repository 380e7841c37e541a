// SPDX-License-Identifier: Apache-2.0
//
// Baseline: products of fp8 e4m3 numbers (OCP 8-bit floating point, 2023; bias 7, subnormal numbers, NaN read as a number)
// into a fixed-point accumulator whose last bit weighs 2^LSB; lower bits are truncated, on the magnitude, and it wraps.

module base_fp8_mac #(
    parameter int ACC_BITS = 24,
    parameter int LSB      = -8,
    parameter int LANES    = 1
) (
    input  logic                          clk_i,
    input  logic                          rst_ni,
    input  logic                          valid_i,
    input  logic        [LANES*8-1:0]     a_i,
    input  logic        [LANES*8-1:0]     w_i,
    output logic signed [ACC_BITS-1:0]    acc_o
);

  // Do not change: follow from the parameters.
  localparam int Drop = LSB + 18;    // the smallest product bit weighs 2^-18
  localparam int TermBits = 36 - Drop + 1;
  localparam int SumBits = TermBits + $clog2(LANES);

  logic [LANES*TermBits-1:0] terms;
  logic signed [SumBits-1:0] sum;

  genvar l;
  generate
    for (l = 0; l < LANES; l = l + 1) begin : gen_lane
      logic [7:0] a, w, product;
      logic [3:0] a_fraction, w_fraction;
      logic [4:0] shift;
      logic [35:0] wide;
      logic signed [TermBits-1:0] magnitude;
      assign a          = a_i[l*8+:8];
      assign w          = w_i[l*8+:8];
      assign a_fraction = {a[6:3] != 4'd0, a[2:0]};
      assign w_fraction = {w[6:3] != 4'd0, w[2:0]};
      assign product    = 8'(a_fraction) * 8'(w_fraction);
      // subnormal numbers have the exponent of the smallest normal ones
      assign shift      = 5'((a[6:3] == 4'd0) ? 4'd0 : a[6:3] - 4'd1) + 5'((w[6:3] == 4'd0) ? 4'd0 : w[6:3] - 4'd1);
      assign wide       = 36'(product) << shift;
      assign magnitude  = $signed(TermBits'(wide >> Drop));
      assign terms[l*TermBits+:TermBits] = (a[7] ^ w[7]) ? -magnitude : magnitude;
    end
  endgenerate

  lns_sum #(
      .N(LANES),
      .IN_BITS(TermBits),
      .OUT_BITS(SumBits)
  ) i_sum (
      .values_i(terms),
      .sum_o(sum)
  );

  always_ff @(posedge clk_i) begin
    if (!rst_ni) acc_o <= '0;
    else if (valid_i) acc_o <= acc_o + ACC_BITS'(sum);
  end

endmodule
