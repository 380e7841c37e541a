// SPDX-License-Identifier: Apache-2.0
//
// The segment of a difference, and the place in it (5.7.10): equal segments of 2^WIDTH_LOG2, or 2^SEGMENTS_LOG2 of them
// an octave of d. Segments are numbered from 0.

module lns_segment #(
    parameter int D_BITS        = 7,
    parameter int SEGMENTS_LOG2 = 2,
    parameter int OCTAVE        = 1,
    parameter int WIDTH_LOG2    = 0,   // of equal segments
    parameter int INDEX_BITS    = 6,
    parameter int LOG_BITS      = 4
) (
    input  logic [D_BITS-1:0]     d_i,
    output logic [INDEX_BITS-1:0] index_o,
    output logic [D_BITS-1:0]     inside_o,
    output logic [LOG_BITS-1:0]   width_log2_o
);

  // Do not change: follow from the parameters.
  localparam int PosBits = (D_BITS > 1) ? $clog2(D_BITS) : 1;
  localparam int Wide = lns_pkg::larger(lns_pkg::larger(D_BITS, INDEX_BITS), PosBits + SEGMENTS_LOG2) + 1;

  logic [LOG_BITS-1:0] width;
  logic [Wide-1:0] wide, part, index;

  assign wide = Wide'(d_i);

  generate
    if (OCTAVE == 0) begin : gen_equal
      assign width = LOG_BITS'(WIDTH_LOG2);
      assign index = wide >> WIDTH_LOG2;
    end else begin : gen_octave
      logic [D_BITS-1:0] normalized;
      logic [PosBits-1:0] position;
      logic low;
      lns_normalize #(
          .BITS(D_BITS),
          .POS_BITS(PosBits)
      ) i_normalize (
          .value_i(d_i),
          .normalized_o(normalized),
          .position_o(position)
      );
      // d < N lies in segment d; octave e holds N segments from (e - log2 N + 1) * N on
      assign low   = (wide >> SEGMENTS_LOG2) == '0;
      assign width = low ? '0 : LOG_BITS'(position) - LOG_BITS'(SEGMENTS_LOG2);
      assign index = (wide >> width) + (Wide'(width) << SEGMENTS_LOG2);
    end
  endgenerate

  assign part         = (wide >> width) << width;
  assign index_o      = index[INDEX_BITS-1:0];
  assign inside_o     = d_i - part[D_BITS-1:0];
  assign width_log2_o = width;

endmodule
