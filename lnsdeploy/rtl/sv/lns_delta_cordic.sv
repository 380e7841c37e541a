// SPDX-License-Identifier: Apache-2.0
//
// Delta by hyperbolic CORDIC: the exponential by rotation, the logarithm by vectoring (5.7.8).

module lns_delta_cordic #(
    parameter int D_BITS     = 7,
    parameter int V_BITS     = 4,
    parameter int GAMMA      = 8,
    parameter int ITERATIONS = 12,
    parameter int WIDTH      = 16,
    parameter logic [63:0] LN2   = 0,  // round(2^WIDTH ln 2)
    parameter logic [63:0] START = 0,  // round(2^WIDTH / gain)
    parameter logic [95:0] SCALE = 0,  // GAMMA round(2^WIDTH / ln 2)
    parameter int PLUS_END   = 36,
    parameter int MINUS_END  = 37,
    parameter int ROM_BASE   = 3
) (
    input  logic              minus_i,
    input  logic [D_BITS-1:0] d_i,
    output logic [V_BITS-1:0] delta_o
);

  // Do not change: follow from the parameters.
  localparam int Bits = WIDTH + 8;
  localparam int Wide = 2 * WIDTH + $clog2(GAMMA) + 16;
  localparam int Split = lns_pkg::larger(D_BITS, $clog2(GAMMA) + 1);
  localparam int PosBits = $clog2(WIDTH + 2);

  logic [Split-1:0] quotient, remainder;
  logic [WIDTH+Split:0] turn;
  logic signed [Bits-1:0] start, nothing, angle, x, y, z, u, v, power, log;
  logic [WIDTH+1:0] v_bits, v_normalized;
  logic [PosBits-1:0] position, zeros;
  logic signed [Bits-1:0] unused_x, unused_y;
  logic signed [Bits-1:0] log_x, log_y, log_z;
  logic signed [Wide-1:0] scaled, rounded, value;
  logic past;

  assign quotient  = Split'(d_i) / Split'(GAMMA);
  assign remainder = Split'(d_i) % Split'(GAMMA);
  assign turn      = ((WIDTH + Split + 1)'(remainder) * (WIDTH + Split + 1)'(LN2)) / (WIDTH + Split + 1)'(GAMMA);

  assign start   = $signed(Bits'(START));
  assign nothing = '0;
  assign angle   = $signed(Bits'(turn));

  lns_cordic #(
      .BITS(Bits),
      .ITERATIONS(ITERATIONS),
      .VECTORING(0),
      .ROM(ROM_BASE)
  ) i_rotation (
      .x_i(start),
      .y_i(nothing),
      .z_i(angle),
      .x_o(x),
      .y_o(y),
      .z_o(z)
  );

  assign power = (x < y) ? '0 : x - y;
  assign u     = power >>> quotient;
  assign v     = minus_i ? $signed(Bits'(1) << WIDTH) - u : $signed(Bits'(1) << WIDTH) + u;

  // v * 2^n >= 2^WIDTH, with the least n; v is at least 1 and below 2^(WIDTH + 2)
  assign v_bits = (v < 1) ? (WIDTH + 2)'(1) : v[WIDTH+1:0];

  lns_normalize #(
      .BITS(WIDTH + 2),
      .POS_BITS(PosBits)
  ) i_normalize (
      .value_i(v_bits),
      .normalized_o(v_normalized),
      .position_o(position)
  );

  assign zeros = (position >= PosBits'(WIDTH)) ? '0 : PosBits'(WIDTH) - position;
  assign log_x = $signed(Bits'(v_bits) << zeros) + $signed(Bits'(1) << WIDTH);
  assign log_y = $signed(Bits'(v_bits) << zeros) - $signed(Bits'(1) << WIDTH);

  lns_cordic #(
      .BITS(Bits),
      .ITERATIONS(ITERATIONS),
      .VECTORING(1),
      .ROM(ROM_BASE)
  ) i_vectoring (
      .x_i(log_x),
      .y_i(log_y),
      .z_i(nothing),
      .x_o(unused_x),
      .y_o(unused_y),
      .z_o(log_z)
  );

  assign log     = 2 * log_z - $signed(Bits'(zeros) * Bits'(LN2));
  assign scaled  = Wide'(log) * $signed(Wide'(SCALE));
  assign rounded = (minus_i ? -scaled : scaled) + $signed(Wide'(1) << (2 * WIDTH - 1));
  assign value   = rounded >>> (2 * WIDTH);
  assign past    = 64'(d_i) >= (minus_i ? 64'(MINUS_END) : 64'(PLUS_END));
  assign delta_o = (past || value < 0) ? '0 : V_BITS'(value);

endmodule
