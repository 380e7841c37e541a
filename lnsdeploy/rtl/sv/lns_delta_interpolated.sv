// SPDX-License-Identifier: Apache-2.0
//
// Delta by a value and a slope per segment, the product truncated (5.7.3). Table entry: {value, slope}.

module lns_delta_interpolated #(
    parameter int D_BITS        = 7,
    parameter int V_BITS        = 4,
    parameter int SEGMENTS_LOG2 = 2,
    parameter int OCTAVE        = 1,
    parameter int PLUS_WIDTH_LOG2  = 0,
    parameter int MINUS_WIDTH_LOG2 = 0,
    parameter int SLOPE_FRACTION = 8,
    parameter int SLOPE_BITS    = 9,
    parameter int PLUS_END      = 36,  // the first d from which on it is 0
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
  localparam int Work = lns_pkg::larger(D_BITS + SLOPE_BITS, V_BITS) + 1;

  logic [INDEX_BITS-1:0] plus_index, minus_index;
  logic [D_BITS-1:0] plus_inside, minus_inside, inside_d;
  logic [LogBits-1:0] plus_width, minus_width;
  logic [V_BITS+SLOPE_BITS-1:0] plus, minus, entry;
  logic past;
  logic [Work-1:0] drop, value;

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
      .DATA_BITS(V_BITS + SLOPE_BITS)
  ) i_plus (
      .addr_i(plus_index),
      .data_o(plus)
  );
  lns_rom #(
      .ID(ROM_BASE + 1),
      .ADDR_BITS(INDEX_BITS),
      .DATA_BITS(V_BITS + SLOPE_BITS)
  ) i_minus (
      .addr_i(minus_index),
      .data_o(minus)
  );

  assign entry    = minus_i ? minus : plus;
  assign inside_d = minus_i ? minus_inside : plus_inside;
  assign past     = 64'(d_i) >= (minus_i ? 64'(MINUS_END) : 64'(PLUS_END));
  assign drop     = (Work'(entry[SLOPE_BITS-1:0]) * Work'(inside_d)) >> SLOPE_FRACTION;
  assign value    = Work'(entry[SLOPE_BITS+:V_BITS]);
  assign delta_o  = (past || drop > value) ? '0 : V_BITS'(value - drop);

endmodule
