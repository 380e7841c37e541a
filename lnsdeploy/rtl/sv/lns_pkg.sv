// SPDX-License-Identifier: Apache-2.0
//
// Names of the choices that modules take as integer parameters, and pure functions on widths.
// The paragraphs cited everywhere are those of the specification, docs/datapath.md.

package lns_pkg;

  // Results below code 1 (2.4)
  localparam int UnderflowZero = 0;
  localparam int UnderflowMin = 1;

  // Fitting to a width (4.4)
  localparam int OverflowWrap = 0;
  localparam int OverflowSaturate = 1;

  // Bits dropped by the alignment (4.3)
  localparam int ShiftTruncate = 0;
  localparam int ShiftRound = 1;

  // Where the remainder's constant is applied (4.2)
  localparam int ConversionProduct = 0;
  localparam int ConversionBin = 1;

  // The accumulator's logarithm (4.6)
  localparam int EncoderExact = 0;
  localparam int EncoderTable = 1;
  localparam int EncoderMitchell = 2;

  // Tables of lns_rom. Those of an adder are counted from its ROM_BASE.
  localparam int RomConstants = 0;
  localparam int RomEncoder = 1;
  localparam int RomFloat = 2;

  // A width of at least one bit, for ports of what may be nothing.
  function automatic int at_least_one(input int bits);
    at_least_one = (bits > 0) ? bits : 1;
  endfunction

  function automatic int larger(input int a, input int b);
    larger = (a > b) ? a : b;
  endfunction

endpackage
