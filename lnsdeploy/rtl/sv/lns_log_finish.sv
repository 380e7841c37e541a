// SPDX-License-Identifier: Apache-2.0
//
// A log accumulator to an output word (5.6): guard bits rounded away, the offset o_acc - o_out added, limited.

module lns_log_finish #(
    parameter int ACC_BITS    = 7,
    parameter int GUARD       = 0,
    parameter int OFFSET_BITS = 12,
    parameter int OUT_BITS    = 8,
    parameter int OUT_SIGNED  = 1,
    parameter int UNDERFLOW   = lns_pkg::UnderflowZero
) (
    input  logic        [ACC_BITS:0]      acc_i,     // {sign, code}
    input  logic signed [OFFSET_BITS-1:0] offset_i,
    output logic        [OUT_BITS-1:0]    word_o
);

  // Do not change: follows from the parameters.
  localparam int CodeBits = lns_pkg::larger(ACC_BITS + 2, OFFSET_BITS) + 1;

  logic [ACC_BITS:0] rounded;
  logic signed [CodeBits-1:0] code;

  assign rounded = ({1'b0, acc_i[ACC_BITS-1:0]} + (ACC_BITS + 1)'((1 << GUARD) >> 1)) >> GUARD;
  assign code    = $signed(CodeBits'(rounded)) + CodeBits'(offset_i);

  lns_output #(
      .CODE_BITS(CodeBits),
      .OUT_BITS(OUT_BITS),
      .OUT_SIGNED(OUT_SIGNED),
      .UNDERFLOW(UNDERFLOW)
  ) i_output (
      .code_i(code),
      .sign_i(acc_i[ACC_BITS]),
      .zero_i(acc_i[ACC_BITS-1:0] == '0),
      .word_o(word_o)
  );

endmodule
