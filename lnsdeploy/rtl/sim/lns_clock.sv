// SPDX-License-Identifier: Apache-2.0
//
// A clock for simulators that need no other harness (Icarus).

`timescale 1ns / 1ps

module lns_clock #(
    parameter int IN_BITS  = 16,
    parameter int OUT_BITS = 8
);

  logic clk;
  initial clk = 1'b0;
  always #5 clk = ~clk;

  lns_tb #(
      .IN_BITS (IN_BITS),
      .OUT_BITS(OUT_BITS)
  ) i_tb (
      .clk_i(clk)
  );

endmodule
