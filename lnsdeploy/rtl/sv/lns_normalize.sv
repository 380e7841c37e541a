// SPDX-License-Identifier: Apache-2.0
//
// Leading one and what follows it: shifts by powers of two, the largest first (4.6).

module lns_normalize #(
    parameter int BITS     = 24,
    parameter int POS_BITS = 5     // of the position BITS - 1
) (
    input  logic [BITS-1:0]     value_i,
    output logic [BITS-1:0]     normalized_o,  // the leading one is its top bit, unless the value is zero
    output logic [POS_BITS-1:0] position_o     // of the leading one
);

  // Do not change: follows from the parameters.
  localparam int Steps = (BITS > 1) ? $clog2(BITS) : 1;

  logic [(Steps+1)*BITS-1:0] stage;
  logic [Steps-1:0] zeros;

  assign stage[BITS-1:0] = value_i;

  genvar i;
  generate
    if (BITS == 1) begin : gen_single
      assign zeros = '0;
      assign stage[BITS+:BITS] = value_i;
    end else begin : gen_shifts
      for (i = 0; i < Steps; i = i + 1) begin : gen_step
        localparam int Shift = 1 << (Steps - 1 - i);
        assign zeros[Steps-1-i] = stage[i*BITS+BITS-1-:Shift] == '0;
        assign stage[(i+1)*BITS+:BITS] = zeros[Steps-1-i] ? stage[i*BITS+:BITS] << Shift : stage[i*BITS+:BITS];
      end
    end
  endgenerate

  assign normalized_o = stage[Steps*BITS+:BITS];
  assign position_o   = POS_BITS'(BITS - 1) - POS_BITS'(zeros);

endmodule
