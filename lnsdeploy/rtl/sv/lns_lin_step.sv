// SPDX-License-Identifier: Apache-2.0
//
// One step of linear accumulation (4.4): the terms of LANES products, in each bin their exact sum fitted to PSUM_BITS,
// added to the accumulator and fitted to ACC_BITS. Without bins there is one accumulator.

module lns_lin_step #(
    parameter int LANES     = 1,
    parameter int TERM_BITS = 24,
    parameter int BINS      = 1,
    parameter int BIN_BITS  = 1,   // of a bin's number, at least 1
    parameter int PSUM_BITS = 24,
    parameter int ACC_BITS  = 24,
    parameter int OVERFLOW  = lns_pkg::OverflowSaturate
) (
    input  logic [LANES*(TERM_BITS+1+BIN_BITS)-1:0] terms_i,  // of each lane {bin, sign, magnitude}
    input  logic [BINS*ACC_BITS-1:0]                acc_i,
    output logic [BINS*ACC_BITS-1:0]                acc_o
);

  // Do not change: follow from the parameters.
  localparam int LaneBits = TERM_BITS + 1 + BIN_BITS;
  localparam int TermBits = TERM_BITS + 1;
  localparam int SumBits = TermBits + $clog2(LANES);
  localparam int NextBits = lns_pkg::larger(PSUM_BITS, ACC_BITS) + 1;

  genvar b, l;
  generate
    for (b = 0; b < BINS; b = b + 1) begin : gen_bin
      logic [LANES*TermBits-1:0] terms;
      logic signed [SumBits-1:0] sum;
      logic signed [PSUM_BITS-1:0] step_sum;
      logic signed [ACC_BITS-1:0] acc, acc_next;
      logic signed [NextBits-1:0] next;

      for (l = 0; l < LANES; l = l + 1) begin : gen_lane
        logic [LaneBits-1:0] lane;
        logic signed [TermBits-1:0] magnitude;
        logic here;
        assign lane      = terms_i[l*LaneBits+:LaneBits];
        assign here      = (BINS == 1) | (lane[TermBits+:BIN_BITS] == BIN_BITS'(b));
        assign magnitude = $signed({1'b0, lane[TERM_BITS-1:0]});
        assign terms[l*TermBits+:TermBits] = !here ? '0 : lane[TERM_BITS] ? -magnitude : magnitude;
      end

      lns_sum #(
          .N(LANES),
          .IN_BITS(TermBits),
          .OUT_BITS(SumBits)
      ) i_sum (
          .values_i(terms),
          .sum_o(sum)
      );
      lns_fit #(
          .IN_BITS(SumBits),
          .OUT_BITS(PSUM_BITS),
          .OVERFLOW(OVERFLOW)
      ) i_fit_step (
          .value_i(sum),
          .value_o(step_sum)
      );
      assign acc = $signed(acc_i[b*ACC_BITS+:ACC_BITS]);
      assign next   = NextBits'(acc) + NextBits'(step_sum);
      lns_fit #(
          .IN_BITS(NextBits),
          .OUT_BITS(ACC_BITS),
          .OVERFLOW(OVERFLOW)
      ) i_fit_acc (
          .value_i(next),
          .value_o(acc_next)
      );
      assign acc_o[b*ACC_BITS+:ACC_BITS] = acc_next;
    end
  endgenerate

endmodule
