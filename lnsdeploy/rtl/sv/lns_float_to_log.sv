// SPDX-License-Identifier: Apache-2.0
//
// Float-to-log encoder: the code of a binary32 number, nearest in the log domain, exact for subnormal ones too (2.1, 2.4).
// offset_i is the tensor's offset. Infinity becomes the largest code; for NaN nan_o is high and the word means nothing.
// A negative number into an unsigned format is taken as 0.

module lns_float_to_log #(
    parameter int GAMMA       = 8,
    parameter int INDEX_BITS  = 4,   // 2^INDEX_BITS segments an octave, at least 2 gamma
    parameter int OFFSET_BITS = 12,
    parameter int OUT_BITS    = 8,
    parameter int OUT_SIGNED  = 1,
    parameter int UNDERFLOW   = lns_pkg::UnderflowZero
) (
    input  logic        [31:0]            x_i,
    input  logic signed [OFFSET_BITS-1:0] offset_i,
    output logic        [OUT_BITS-1:0]    word_o,
    output logic                          nan_o
);

  // Do not change: follow from the parameters.
  localparam int CodeBits = $clog2(GAMMA + 1);
  localparam int Wide = lns_pkg::larger(CodeBits + 10, OFFSET_BITS) + 2;

  logic [23:0] significand, normalized;
  logic [4:0] position;
  logic [7:0] exponent;
  logic [CodeBits-1:0] octave_code;
  logic signed [Wide-1:0] octave, code, limited;
  logic infinite;

  assign exponent    = x_i[30:23];
  assign significand = {exponent != 8'd0, x_i[22:0]};
  assign infinite    = exponent == 8'd255;
  assign nan_o       = infinite && x_i[22:0] != 23'd0;

  lns_normalize #(
      .BITS(24),
      .POS_BITS(5)
  ) i_normalize (
      .value_i(significand),
      .normalized_o(normalized),
      .position_o(position)
  );
  lns_fraction #(
      .FRACTION_BITS(23),
      .INDEX_BITS(INDEX_BITS),
      .CODE_BITS(CodeBits),
      .ROM(lns_pkg::RomFloat)
  ) i_fraction (
      .fraction_i(normalized[22:0]),
      .code_o(octave_code)
  );

  // the value's octave: exponent - 127, or one for subnormal numbers' fields; less what normalising shifted
  assign octave  = $signed(Wide'(exponent)) + ((exponent == 8'd0) ? $signed(Wide'(1)) : $signed(Wide'(0))) + $signed(Wide'(position)) - $signed(Wide'(150));
  assign code    = octave * $signed(Wide'(GAMMA)) + $signed(Wide'(octave_code)) - Wide'(offset_i);
  assign limited = infinite ? $signed({1'b0, {(Wide - 1) {1'b1}}}) : code;

  lns_output #(
      .CODE_BITS(Wide),
      .OUT_BITS(OUT_BITS),
      .OUT_SIGNED(OUT_SIGNED),
      .UNDERFLOW(UNDERFLOW)
  ) i_output (
      .code_i(limited),
      .sign_i(x_i[31]),
      .zero_i(significand == '0),
      .word_o(word_o)
  );

endmodule
