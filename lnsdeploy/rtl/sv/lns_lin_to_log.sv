// SPDX-License-Identifier: Apache-2.0
//
// Linear-to-log converter: the code of a positive integer, gamma = 2^F codes per octave (4.6).

module lns_lin_to_log #(
    parameter int IN_BITS      = 24,
    parameter int F            = 3,
    parameter int ENCODER      = lns_pkg::EncoderExact,
    parameter int ENCODER_BITS = 4,   // bits after the leading one that are looked at first
    parameter int RAW_BITS     = 8    // of the largest code
) (
    input  logic [IN_BITS-1:0]  magnitude_i,
    output logic [RAW_BITS-1:0] code_o
);

  // Do not change: follow from the parameters.
  localparam int PosBits = (IN_BITS > 1) ? $clog2(IN_BITS) : 1;
  localparam int Fraction = (IN_BITS - 1 > ENCODER_BITS) ? IN_BITS - 1 : lns_pkg::at_least_one(ENCODER_BITS);

  logic [IN_BITS-1:0] normalized;
  logic [PosBits-1:0] position;
  logic [Fraction-1:0] fraction;
  logic [F:0] octave_code;

  lns_normalize #(
      .BITS(IN_BITS),
      .POS_BITS(PosBits)
  ) i_normalize (
      .value_i(magnitude_i),
      .normalized_o(normalized),
      .position_o(position)
  );

  generate
    if (IN_BITS == 1) begin : gen_nothing
      assign fraction = '0;
    end else begin : gen_fraction
      assign fraction = Fraction'(normalized[IN_BITS-2:0]) << (Fraction - (IN_BITS - 1));
    end

    if (ENCODER == lns_pkg::EncoderExact) begin : gen_exact
      lns_fraction #(
          .FRACTION_BITS(Fraction),
          .INDEX_BITS(ENCODER_BITS),
          .CODE_BITS(F + 1),
          .ROM(lns_pkg::RomEncoder)
      ) i_fraction (
          .fraction_i(fraction),
          .code_o(octave_code)
      );
    end else if (ENCODER == lns_pkg::EncoderTable) begin : gen_table
      lns_rom #(
          .ID(lns_pkg::RomEncoder),
          .ADDR_BITS(ENCODER_BITS),
          .DATA_BITS(F + 1)
      ) i_logs (
          .addr_i(fraction[Fraction-1-:ENCODER_BITS]),
          .data_o(octave_code)
      );
    end else if (F > 0) begin : gen_mitchell
      assign octave_code = {1'b0, fraction[Fraction-1-:F]};
    end else begin : gen_position_only
      assign octave_code = '0;
    end
  endgenerate

  assign code_o = (RAW_BITS'(position) << F) + RAW_BITS'(octave_code);

endmodule
