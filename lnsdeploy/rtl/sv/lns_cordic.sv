// SPDX-License-Identifier: Apache-2.0
//
// One pass of hyperbolic CORDIC in fixed point, unrolled (5.7.8): indices 1, 2, 3, 4, 4, 5, ... with 4, 13 and 40 twice.
// The angles are a table of the iteration.

module lns_cordic #(
    parameter int BITS       = 22,
    parameter int ITERATIONS = 12,
    parameter int VECTORING  = 0,
    parameter int ROM        = 3
) (
    input  logic signed [BITS-1:0] x_i,
    input  logic signed [BITS-1:0] y_i,
    input  logic signed [BITS-1:0] z_i,
    output logic signed [BITS-1:0] x_o,
    output logic signed [BITS-1:0] y_o,
    output logic signed [BITS-1:0] z_o
);

  // The shift of an iteration, counted from 0.
  function automatic int shift_of(input int iteration);
    shift_of = iteration + 1 - ((iteration > 3) ? 1 : 0) - ((iteration > 13) ? 1 : 0) - ((iteration > 41) ? 1 : 0);
  endfunction

  logic [(ITERATIONS+1)*BITS-1:0] x, y, z;

  assign x[BITS-1:0] = x_i;
  assign y[BITS-1:0] = y_i;
  assign z[BITS-1:0] = z_i;

  genvar i;
  generate
    for (i = 0; i < ITERATIONS; i = i + 1) begin : gen_iteration
      localparam int Shift = shift_of(i);
      logic signed [BITS-1:0] x_now, y_now, z_now, x_part, y_part, angle;
      logic [BITS-1:0] entry;
      logic up;
      lns_rom #(
          .ID(ROM),
          .ADDR_BITS(6),
          .DATA_BITS(BITS)
      ) i_angle (
          .addr_i(6'(i)),
          .data_o(entry)
      );
      assign angle  = $signed(entry);
      assign x_now  = $signed(x[i*BITS+:BITS]);
      assign y_now  = $signed(y[i*BITS+:BITS]);
      assign z_now  = $signed(z[i*BITS+:BITS]);
      assign x_part = x_now >>> Shift;
      assign y_part = y_now >>> Shift;
      assign up     = (VECTORING != 0) ? y_now < 0 : z_now >= 0;
      assign x[(i+1)*BITS+:BITS] = up ? x_now + y_part : x_now - y_part;
      assign y[(i+1)*BITS+:BITS] = up ? y_now + x_part : y_now - x_part;
      assign z[(i+1)*BITS+:BITS] = up ? z_now - angle : z_now + angle;
    end
  endgenerate

  assign x_o = $signed(x[ITERATIONS*BITS+:BITS]);
  assign y_o = $signed(y[ITERATIONS*BITS+:BITS]);
  assign z_o = $signed(z[ITERATIONS*BITS+:BITS]);

endmodule
