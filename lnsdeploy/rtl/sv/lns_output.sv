// SPDX-License-Identifier: Apache-2.0
//
// A signed code, limited to a format, as a word (2.4): above the largest code that code; below 1 zero, or 1.
// A negative result into an unsigned format is taken as 0 (4.6).

module lns_output #(
    parameter int CODE_BITS  = 12,
    parameter int OUT_BITS   = 8,
    parameter int OUT_SIGNED = 1,
    parameter int UNDERFLOW  = lns_pkg::UnderflowZero
) (
    input  logic signed [CODE_BITS-1:0] code_i,
    input  logic                        sign_i,
    input  logic                        zero_i,
    output logic        [OUT_BITS-1:0]  word_o
);

  // Do not change: follow from the parameters.
  localparam int Magnitude = OUT_BITS - OUT_SIGNED;
  localparam int Wide = lns_pkg::larger(CODE_BITS, Magnitude + 2);

  logic signed [Wide-1:0] code, most;
  logic zero, under, over, sign;
  logic [Magnitude-1:0] limited;

  assign code    = Wide'(code_i);
  assign most    = $signed({{(Wide - Magnitude) {1'b0}}, {Magnitude{1'b1}}});
  assign zero    = zero_i | ((OUT_SIGNED == 0) & sign_i);
  assign under   = code < 1;
  assign over    = code > most;
  assign limited = (zero | under) ? Magnitude'(UNDERFLOW) : over ? '1 : code[Magnitude-1:0];
  assign sign    = sign_i & ~zero & (limited != '0);

  generate
    if (OUT_SIGNED != 0) begin : gen_signed
      assign word_o = {sign, limited};
    end else begin : gen_unsigned
      assign word_o = limited;
    end
  endgenerate

endmodule
