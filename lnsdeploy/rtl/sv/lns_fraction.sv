// SPDX-License-Identifier: Apache-2.0
//
// The code within an octave, nearest in the log domain (2.1): the top bits of the fraction select a segment that is
// shorter than the distance of two thresholds, so it holds at most one, and one comparison decides.
// Table entry: {codes below the segment, the threshold's place in it}; a place past the end where there is none.

module lns_fraction #(
    parameter int FRACTION_BITS = 23,
    parameter int INDEX_BITS    = 4,
    parameter int CODE_BITS     = 4,   // of gamma
    parameter int ROM           = lns_pkg::RomEncoder
) (
    input  logic [FRACTION_BITS-1:0] fraction_i,  // after the leading one
    output logic [CODE_BITS-1:0]     code_o       // 0 to gamma
);

  // Do not change: follow from the parameters.
  localparam int LowBits = FRACTION_BITS - INDEX_BITS;

  logic [CODE_BITS+LowBits:0] entry;
  logic above;

  lns_rom #(
      .ID(ROM),
      .ADDR_BITS(INDEX_BITS),
      .DATA_BITS(CODE_BITS + LowBits + 1)
  ) i_thresholds (
      .addr_i(fraction_i[FRACTION_BITS-1-:INDEX_BITS]),
      .data_o(entry)
  );

  generate
    if (LowBits > 0) begin : gen_compare
      assign above = {1'b0, fraction_i[LowBits-1:0]} >= entry[LowBits:0];
    end else begin : gen_exact
      assign above = 1'b0;
    end
  endgenerate

  assign code_o = entry[LowBits+1+:CODE_BITS] + CODE_BITS'(above);

endmodule
