// SPDX-License-Identifier: Apache-2.0
//
// Baseline: bfloat16 products, exact, into a binary32-like accumulator (8 bits of exponent, 23 of fraction). The adder
// keeps three more bits and truncates; subnormal numbers are zero, overflow becomes infinity.

module base_bf16_mac (
    input  logic        clk_i,
    input  logic        rst_ni,
    input  logic        valid_i,
    input  logic [15:0] a_i,
    input  logic [15:0] w_i,
    output logic [31:0] acc_o
);

  logic [15:0] product;
  logic product_sign, product_zero, acc_zero, product_larger;
  logic signed [10:0] product_exponent, acc_exponent, upper_exponent, gap, exponent;
  logic [26:0] product_fraction, acc_fraction, upper_fraction, lower_fraction, moved;
  logic upper_sign, lower_sign;
  logic [27:0] sum, normalized;
  logic [4:0] position;
  logic [31:0] next;

  assign product      = 16'({1'b1, a_i[6:0]}) * 16'({1'b1, w_i[6:0]});
  assign product_sign = a_i[15] ^ w_i[15];
  assign product_zero = (a_i[14:7] == 8'd0) | (w_i[14:7] == 8'd0);
  assign product_exponent = product_zero ? '0 :
      $signed(11'(a_i[14:7])) + $signed(11'(w_i[14:7])) - 11'sd127 + $signed(11'(product[15]));
  assign product_fraction = product_zero ? '0 : {product[15] ? product : {product[14:0], 1'b0}, 11'd0};

  assign acc_zero     = acc_o[30:23] == 8'd0;
  assign acc_exponent = $signed(11'(acc_o[30:23]));
  assign acc_fraction = acc_zero ? '0 : {1'b1, acc_o[22:0], 3'd0};

  assign product_larger = product_zero ? 1'b0 : acc_zero ? 1'b1 :
      (product_exponent > acc_exponent) | ((product_exponent == acc_exponent) & (product_fraction > acc_fraction));
  assign upper_exponent = product_larger ? product_exponent : acc_exponent;
  assign gap            = product_larger ? product_exponent - acc_exponent : acc_exponent - product_exponent;
  assign upper_fraction = product_larger ? product_fraction : acc_fraction;
  assign lower_fraction = product_larger ? acc_fraction : product_fraction;
  assign upper_sign     = product_larger ? product_sign : acc_o[31];
  assign lower_sign     = product_larger ? acc_o[31] : product_sign;
  assign moved          = lower_fraction >> $unsigned(gap);
  assign sum = (upper_sign ^ lower_sign) ? {1'b0, upper_fraction} - {1'b0, moved} : {1'b0, upper_fraction} + {1'b0, moved};

  lns_normalize #(
      .BITS(28),
      .POS_BITS(5)
  ) i_normalize (
      .value_i(sum),
      .normalized_o(normalized),
      .position_o(position)
  );

  assign exponent = upper_exponent + $signed(11'(position)) - 11'sd26;

  always_comb begin
    if (sum == '0 || exponent < 1) next = '0;
    else if (exponent > 254) next = {upper_sign, 8'd255, 23'd0};
    else next = {upper_sign, exponent[7:0], normalized[26:4]};
  end

  always_ff @(posedge clk_i) begin
    if (!rst_ni) acc_o <= '0;
    else if (valid_i) acc_o <= next;
  end

endmodule
