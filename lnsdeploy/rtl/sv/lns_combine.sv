// SPDX-License-Identifier: Apache-2.0
//
// Bins to one integer: each times its constant, summed exactly (4.6).

module lns_combine #(
    parameter int BINS       = 8,
    parameter int BIN_BITS   = 3,
    parameter int ACC_BITS   = 24,
    parameter int CONST_BITS = 8,
    parameter int TOTAL_BITS = 36
) (
    input  logic        [BINS*ACC_BITS-1:0] bins_i,
    output logic signed [TOTAL_BITS-1:0]    total_o
);

  // Do not change: follow from the parameters.
  localparam int TBits = CONST_BITS + 1;
  localparam int PartBits = ACC_BITS + TBits;

  logic [BINS*PartBits-1:0] parts;

  genvar b;
  generate
    for (b = 0; b < BINS; b = b + 1) begin : gen_bin
      logic [TBits-1:0] constant;
      logic signed [PartBits-1:0] factor, value, part;
      lns_rom #(
          .ID(lns_pkg::RomConstants),
          .ADDR_BITS(BIN_BITS),
          .DATA_BITS(TBits)
      ) i_constant (
          .addr_i(BIN_BITS'(b)),
          .data_o(constant)
      );
      assign factor = $signed(PartBits'(constant));
      assign value  = PartBits'($signed(bins_i[b*ACC_BITS+:ACC_BITS]));
      assign part   = factor * value;
      assign parts[b*PartBits+:PartBits] = part;
    end
  endgenerate

  lns_sum #(
      .N(BINS),
      .IN_BITS(PartBits),
      .OUT_BITS(TOTAL_BITS)
  ) i_sum (
      .values_i(parts),
      .sum_o(total_o)
  );

endmodule
