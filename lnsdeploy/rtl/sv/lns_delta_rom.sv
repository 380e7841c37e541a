// SPDX-License-Identifier: Apache-2.0
//
// Delta by tables, one for sums and one for differences: exact (5.7.1), or an entry a step (5.7.2).

module lns_delta_rom #(
    parameter int D_BITS     = 7,
    parameter int V_BITS     = 4,
    parameter int STEP_LOG2  = 0,
    parameter int INDEX_BITS = 6,   // of the last index
    parameter int ROM_BASE   = 3
) (
    input  logic              minus_i,
    input  logic [D_BITS-1:0] d_i,
    output logic [V_BITS-1:0] delta_o
);

  // Do not change: follows from the parameters.
  localparam int Wide = lns_pkg::larger(D_BITS, INDEX_BITS) + 1;

  logic [Wide-1:0] index;
  logic [INDEX_BITS-1:0] address;
  logic [V_BITS-1:0] plus, minus;
  logic past;

  assign index   = Wide'(d_i) >> STEP_LOG2;
  assign address = index[INDEX_BITS-1:0];
  assign past    = (index >> INDEX_BITS) != '0;

  lns_rom #(
      .ID(ROM_BASE),
      .ADDR_BITS(INDEX_BITS),
      .DATA_BITS(V_BITS)
  ) i_plus (
      .addr_i(address),
      .data_o(plus)
  );
  lns_rom #(
      .ID(ROM_BASE + 1),
      .ADDR_BITS(INDEX_BITS),
      .DATA_BITS(V_BITS)
  ) i_minus (
      .addr_i(address),
      .data_o(minus)
  );

  assign delta_o = past ? '0 : minus_i ? minus : plus;

endmodule
