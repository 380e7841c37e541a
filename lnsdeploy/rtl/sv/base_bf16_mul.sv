// SPDX-License-Identifier: Apache-2.0
//
// Baseline: bfloat16 multiplier, rounding to nearest even; subnormal numbers are taken as and become zero, overflow
// becomes infinity. Infinities and NaN among the operands are read as the large numbers that their fields say.

module base_bf16_mul (
    input  logic [15:0] a_i,
    input  logic [15:0] b_i,
    output logic [15:0] y_o
);

  logic [7:0] a_fraction, b_fraction;
  logic [15:0] product;
  logic [8:0] kept;
  logic [7:0] fraction;
  logic signed [10:0] exponent, rounded_exponent;
  logic guard, sticky, up, zero, sign, high;

  assign a_fraction = {1'b1, a_i[6:0]};
  assign b_fraction = {1'b1, b_i[6:0]};
  assign zero       = (a_i[14:7] == 8'd0) | (b_i[14:7] == 8'd0);
  assign sign       = a_i[15] ^ b_i[15];
  assign product    = 16'(a_fraction) * 16'(b_fraction);
  assign high       = product[15];
  assign fraction   = high ? product[15:8] : product[14:7];
  assign guard      = high ? product[7] : product[6];
  assign sticky     = high ? product[6:0] != 7'd0 : product[5:0] != 6'd0;
  assign up         = guard & (sticky | fraction[0]);
  assign kept       = {1'b0, fraction} + 9'(up);
  assign exponent   = $signed(11'(a_i[14:7])) + $signed(11'(b_i[14:7])) - 11'sd127 + $signed(11'(high));
  assign rounded_exponent = exponent + $signed(11'(kept[8]));

  always_comb begin
    if (zero || rounded_exponent < 1) y_o = {sign, 15'd0};
    else if (rounded_exponent > 254) y_o = {sign, 8'd255, 7'd0};
    else y_o = {sign, rounded_exponent[7:0], kept[8] ? 7'd0 : kept[6:0]};
  end

endmodule
