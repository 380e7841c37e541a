// SPDX-License-Identifier: Apache-2.0
//
// Delta for differences near its singularity from two small tables and the one for sums (5.7.4), which both share.

module lns_delta_cotransform #(
    parameter int D_BITS    = 7,
    parameter int V_BITS    = 4,
    parameter int SPLIT     = 3,
    parameter int PLUS_BITS = 6,   // index of the table for sums
    parameter int HIGH_BITS = 3,   // index of T1
    parameter int PLUS_END  = 36,  // the first d from which on it is 0
    parameter int MINUS_END = 37,
    parameter int ROM_BASE  = 3
) (
    input  logic              minus_i,
    input  logic [D_BITS-1:0] d_i,
    output logic [V_BITS-1:0] delta_o
);

  // Do not change: follow from the parameters.
  localparam int Wide = lns_pkg::larger(lns_pkg::larger(D_BITS, SPLIT), V_BITS) + 2;
  localparam int Index = lns_pkg::larger(lns_pkg::larger(Wide, PLUS_BITS), HIGH_BITS + SPLIT) + 1;

  logic [Wide-1:0] d, high, x, y, gap, least, both;
  logic [Index-1:0] plus_at, high_at;
  logic [SPLIT-1:0] low;
  logic [V_BITS-1:0] from_high, from_low, plus, shared;

  assign d       = Wide'(d_i);
  assign high    = (d >> SPLIT) << SPLIT;
  assign low     = d[SPLIT-1:0];
  assign high_at = Index'(d >> SPLIT);

  lns_rom #(
      .ID(ROM_BASE + 1),
      .ADDR_BITS(HIGH_BITS),
      .DATA_BITS(V_BITS)
  ) i_high (
      .addr_i(high_at[HIGH_BITS-1:0]),
      .data_o(from_high)
  );
  lns_rom #(
      .ID(ROM_BASE + 2),
      .ADDR_BITS(SPLIT),
      .DATA_BITS(V_BITS)
  ) i_low (
      .addr_i(low),
      .data_o(from_low)
  );

  assign x       = Wide'(from_high);
  assign y       = high + Wide'(from_low);
  assign least   = (x < y) ? x : y;
  assign gap     = (x < y) ? y - x : x - y;
  assign plus_at = minus_i ? Index'(gap) : Index'(d);

  lns_rom #(
      .ID(ROM_BASE),
      .ADDR_BITS(PLUS_BITS),
      .DATA_BITS(V_BITS)
  ) i_plus (
      .addr_i(plus_at[PLUS_BITS-1:0]),
      .data_o(plus)
  );

  assign shared = (64'(plus_at) >= 64'(PLUS_END)) ? '0 : plus;
  assign both   = (least < Wide'(shared)) ? '0 : least - Wide'(shared);

  always_comb begin
    if (!minus_i) delta_o = shared;
    else if (64'(d_i) >= 64'(MINUS_END)) delta_o = '0;
    else if (high == '0) delta_o = from_low;
    else if (low == '0) delta_o = from_high;
    else delta_o = both[V_BITS-1:0];
  end

endmodule
