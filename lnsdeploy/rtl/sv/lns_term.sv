// SPDX-License-Identifier: Apache-2.0
//
// A product's code to an aligned magnitude (4.1 to 4.3). The quotient of the code is a shift, its top remainder bits
// select a constant, the others are Mitchell's. align_i is F + lambda: how far the accumulator's least significant bit
// lies above that of the shifted mantissa; tied to a constant it costs wires only.

module lns_term #(
    parameter int P_BITS      = 8,
    parameter int F           = 3,  // log2 of gamma
    parameter int TABLE_BITS  = 3,
    parameter int CONST_BITS  = 8,
    parameter int CONVERSION  = lns_pkg::ConversionProduct,
    parameter int SHIFT       = lns_pkg::ShiftTruncate,
    parameter int ALIGN_BITS  = 8,
    parameter int TERM_BITS   = 24  // of the largest aligned magnitude
) (
    input  logic        [P_BITS-1:0]                              code_i,
    input  logic                                                  zero_i,
    input  logic signed [ALIGN_BITS-1:0]                          align_i,
    output logic        [TERM_BITS-1:0]                           magnitude_o,
    output logic        [lns_pkg::at_least_one(TABLE_BITS)-1:0]   bin_o
);

  // Do not change: follow from the parameters.
  localparam int LowBits = F - TABLE_BITS;
  localparam int EBits = (LowBits > 0) ? F + 1 : 1;
  localparam int TBits = (CONVERSION == lns_pkg::ConversionProduct) ? CONST_BITS + 1 : 0;
  localparam int MBits = EBits + TBits;
  localparam int QBits = (P_BITS > F) ? P_BITS - F : 1;
  localparam int Wide = MBits + (1 << QBits);  // one bit more than the largest, for rounding
  localparam int Full = (Wide > TERM_BITS) ? Wide : TERM_BITS;
  localparam int BinBits = lns_pkg::at_least_one(TABLE_BITS);

  logic [P_BITS+F:0] padded;
  logic [QBits-1:0] quotient;
  logic [BinBits-1:0] high;
  logic [EBits-1:0] mitchell;
  logic [MBits-1:0] mantissa;

  assign padded   = (P_BITS + F + 1)'(code_i);
  assign quotient = padded[F+:QBits];

  generate
    if (TABLE_BITS > 0) begin : gen_high
      assign high = padded[LowBits+:TABLE_BITS];
    end else begin : gen_no_high
      assign high = 1'b0;
    end

    if (LowBits > 0) begin : gen_mitchell
      assign mitchell = EBits'({1'b1, {F{1'b0}}}) | EBits'(padded[LowBits-1:0]);
    end else begin : gen_one
      assign mitchell = 1'b1;
    end

    if (CONVERSION == lns_pkg::ConversionProduct) begin : gen_constant
      logic [TBits-1:0] constant;
      lns_rom #(
          .ID(lns_pkg::RomConstants),
          .ADDR_BITS(BinBits),
          .DATA_BITS(TBits)
      ) i_constants (
          .addr_i(high),
          .data_o(constant)
      );
      if (LowBits > 0) begin : gen_product
        assign mantissa = MBits'(constant) * MBits'(mitchell);
      end else begin : gen_constant_only
        assign mantissa = MBits'(constant);
      end
    end else begin : gen_bin
      assign mantissa = mitchell;
    end
  endgenerate

  // floor((M * 2^q + half) / 2^align), half of the last kept bit where rounding
  logic [Full-1:0] shifted, half, rounded, aligned;
  logic signed [ALIGN_BITS:0] right, left, below;

  assign right   = (ALIGN_BITS + 1)'(align_i);
  assign left    = -right;
  assign below   = right - 1;
  assign shifted = Full'(mantissa) << quotient;
  assign half    = (SHIFT == lns_pkg::ShiftRound && right > 0) ? Full'(1) << $unsigned(below) : '0;
  assign rounded = shifted + half;
  assign aligned = (right < 0) ? rounded << $unsigned(left) : rounded >> $unsigned(right);

  assign magnitude_o = zero_i ? '0 : aligned[TERM_BITS-1:0];
  assign bin_o       = high;

endmodule
