// SPDX-License-Identifier: Apache-2.0
//
// A linear accumulator to an output word (4.6): sign apart, its logarithm, plus the offset
// gamma lambda' + S_n - o_out, limited.

module lns_lin_finish #(
    parameter int F            = 3,
    parameter int TABLE_BITS   = 3,
    parameter int CONST_BITS   = 8,
    parameter int CONVERSION   = lns_pkg::ConversionProduct,
    parameter int ACC_BITS     = 24,
    parameter int TOTAL_BITS   = 24,  // of the combined bins; ACC_BITS without bins
    parameter int ENCODER      = lns_pkg::EncoderExact,
    parameter int ENCODER_BITS = 4,
    parameter int OFFSET_BITS  = 12,
    parameter int OUT_BITS     = 8,
    parameter int OUT_SIGNED   = 1,
    parameter int UNDERFLOW    = lns_pkg::UnderflowZero,
    // Do not change: follows from the parameters.
    parameter int BINS         = (CONVERSION == lns_pkg::ConversionBin) ? (1 << TABLE_BITS) : 1
) (
    input  logic        [BINS*ACC_BITS-1:0]  acc_i,
    input  logic signed [OFFSET_BITS-1:0]    offset_i,
    output logic        [OUT_BITS-1:0]       word_o
);

  // Do not change: follow from the parameters.
  localparam int RawBits = $clog2(TOTAL_BITS + 1) + F + 1;
  localparam int CodeBits = lns_pkg::larger(RawBits + 1, OFFSET_BITS) + 1;

  logic signed [TOTAL_BITS-1:0] total;
  logic [TOTAL_BITS-1:0] magnitude;
  logic [RawBits-1:0] raw;
  logic signed [CodeBits-1:0] code;

  generate
    if (CONVERSION == lns_pkg::ConversionBin) begin : gen_bins
      lns_combine #(
          .BINS(BINS),
          .BIN_BITS(lns_pkg::at_least_one(TABLE_BITS)),
          .ACC_BITS(ACC_BITS),
          .CONST_BITS(CONST_BITS),
          .TOTAL_BITS(TOTAL_BITS)
      ) i_combine (
          .bins_i(acc_i),
          .total_o(total)
      );
    end else begin : gen_single
      assign total = TOTAL_BITS'($signed(acc_i));
    end
  endgenerate

  assign magnitude = total[TOTAL_BITS-1] ? $unsigned(-total) : $unsigned(total);

  lns_lin_to_log #(
      .IN_BITS(TOTAL_BITS),
      .F(F),
      .ENCODER(ENCODER),
      .ENCODER_BITS(ENCODER_BITS),
      .RAW_BITS(RawBits)
  ) i_encode (
      .magnitude_i(magnitude),
      .code_o(raw)
  );

  assign code = $signed(CodeBits'(raw)) + CodeBits'(offset_i);

  lns_output #(
      .CODE_BITS(CodeBits),
      .OUT_BITS(OUT_BITS),
      .OUT_SIGNED(OUT_SIGNED),
      .UNDERFLOW(UNDERFLOW)
  ) i_output (
      .code_i(code),
      .sign_i(total[TOTAL_BITS-1]),
      .zero_i(magnitude == '0),
      .word_o(word_o)
  );

endmodule
