// SPDX-License-Identifier: Apache-2.0
//
// Delta by Horner's rule in fixed point per segment, truncating after each product (5.7.7).
// Table entry: {C_n, ..., C_1, C_0}, each a signed integer of COEFFICIENT_BITS.

module lns_delta_polynomial #(
    parameter int D_BITS        = 7,
    parameter int V_BITS        = 4,
    parameter int DEGREE        = 2,
    parameter int SEGMENTS_LOG2 = 2,
    parameter int OCTAVE        = 1,
    parameter int PLUS_WIDTH_LOG2  = 0,
    parameter int MINUS_WIDTH_LOG2 = 0,
    parameter int FRACTION      = 8,
    parameter int COEFFICIENT_BITS = 14,
    parameter int HORNER_BITS   = 16,  // of every intermediate value
    parameter int PLUS_END      = 36,
    parameter int MINUS_END     = 37,
    parameter int INDEX_BITS    = 6,
    parameter int ROM_BASE      = 3
) (
    input  logic              minus_i,
    input  logic [D_BITS-1:0] d_i,
    output logic [V_BITS-1:0] delta_o
);

  // Do not change: follow from the parameters.
  localparam int LogBits = $clog2(D_BITS + 1) + 1;
  localparam int EntryBits = (DEGREE + 1) * COEFFICIENT_BITS;
  localparam int Work = HORNER_BITS + D_BITS + 1;

  logic [INDEX_BITS-1:0] plus_index, minus_index;
  logic [D_BITS-1:0] plus_inside, minus_inside, inside_d;
  logic [LogBits-1:0] plus_width, minus_width, width;
  logic [EntryBits-1:0] plus, minus, entry;
  logic [(DEGREE+1)*HORNER_BITS-1:0] horner;
  logic signed [HORNER_BITS:0] rounded, value;
  logic past;

  lns_segment #(
      .D_BITS(D_BITS),
      .SEGMENTS_LOG2(SEGMENTS_LOG2),
      .OCTAVE(OCTAVE),
      .WIDTH_LOG2(PLUS_WIDTH_LOG2),
      .INDEX_BITS(INDEX_BITS),
      .LOG_BITS(LogBits)
  ) i_plus_segment (
      .d_i(d_i),
      .index_o(plus_index),
      .inside_o(plus_inside),
      .width_log2_o(plus_width)
  );
  lns_segment #(
      .D_BITS(D_BITS),
      .SEGMENTS_LOG2(SEGMENTS_LOG2),
      .OCTAVE(OCTAVE),
      .WIDTH_LOG2(MINUS_WIDTH_LOG2),
      .INDEX_BITS(INDEX_BITS),
      .LOG_BITS(LogBits)
  ) i_minus_segment (
      .d_i(d_i),
      .index_o(minus_index),
      .inside_o(minus_inside),
      .width_log2_o(minus_width)
  );
  lns_rom #(
      .ID(ROM_BASE),
      .ADDR_BITS(INDEX_BITS),
      .DATA_BITS(EntryBits)
  ) i_plus (
      .addr_i(plus_index),
      .data_o(plus)
  );
  lns_rom #(
      .ID(ROM_BASE + 1),
      .ADDR_BITS(INDEX_BITS),
      .DATA_BITS(EntryBits)
  ) i_minus (
      .addr_i(minus_index),
      .data_o(minus)
  );

  assign entry    = minus_i ? minus : plus;
  assign inside_d = minus_i ? minus_inside : plus_inside;
  assign width    = minus_i ? minus_width : plus_width;
  assign past     = 64'(d_i) >= (minus_i ? 64'(MINUS_END) : 64'(PLUS_END));

  assign horner[DEGREE*HORNER_BITS+:HORNER_BITS] =
      HORNER_BITS'($signed(entry[DEGREE*COEFFICIENT_BITS+:COEFFICIENT_BITS]));

  genvar k;
  generate
    for (k = 0; k < DEGREE; k = k + 1) begin : gen_horner
      logic signed [Work-1:0] product, place, coefficient, next;
      assign place       = $signed(Work'(inside_d));
      assign product     = Work'($signed(horner[(k+1)*HORNER_BITS+:HORNER_BITS])) * place;
      assign coefficient = Work'($signed(entry[k*COEFFICIENT_BITS+:COEFFICIENT_BITS]));
      assign next        = (product >>> width) + coefficient;
      assign horner[k*HORNER_BITS+:HORNER_BITS] = next[HORNER_BITS-1:0];
    end
  endgenerate

  assign rounded = (HORNER_BITS + 1)'($signed(horner[HORNER_BITS-1:0])) + (HORNER_BITS + 1)'((1 << FRACTION) >> 1);
  assign value   = rounded >>> FRACTION;
  assign delta_o = (past || value < 0) ? '0 : V_BITS'(value);

endmodule
