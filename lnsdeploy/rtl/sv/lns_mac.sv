// SPDX-License-Identifier: Apache-2.0
//
// Scalar multiply-accumulate: one product a clock into a register, linear (4.1 to 4.4) or logarithmic (5.1 to 5.3).
// acc_o is the register: the bins of a linear accumulator, or {sign, code}.

module lns_mac #(
    parameter int A_BITS       = 8,
    parameter int A_SIGNED     = 1,
    parameter int A_SCALE      = 1,
    parameter int W_BITS       = 8,
    parameter int W_SIGNED     = 1,
    parameter int W_SCALE      = 1,
    parameter int P_BITS       = 8,
    parameter int LOG          = 0,
    parameter int ACC_BITS     = 24,
    parameter int SCALE_BITS   = 8,
    parameter int F            = 3,
    parameter int TABLE_BITS   = 3,
    parameter int CONST_BITS   = 8,
    parameter int CONVERSION   = lns_pkg::ConversionProduct,
    parameter int SHIFT        = lns_pkg::ShiftTruncate,
    parameter int TERM_BITS    = 24,
    parameter int PSUM_BITS    = 24,
    parameter int OVERFLOW     = lns_pkg::OverflowSaturate,
    parameter int GUARD        = 0,
    parameter int DELTA_BITS   = 4,
    // Do not change: follows from the parameters.
    parameter int STATE_BITS   = (LOG != 0) ? ACC_BITS + 1 :
        (CONVERSION == lns_pkg::ConversionBin) ? (1 << TABLE_BITS) * ACC_BITS : ACC_BITS
) (
    input  logic                         clk_i,
    input  logic                         rst_ni,    // clears the accumulator
    input  logic                         valid_i,
    input  logic        [A_BITS-1:0]     a_i,
    input  logic        [W_BITS-1:0]     w_i,
    input  logic signed [SCALE_BITS-1:0] scale_i,   // as of lns_pe
    output logic        [STATE_BITS-1:0] acc_o
);

  // Do not change: follow from the parameters.
  localparam int BinBits = lns_pkg::at_least_one(TABLE_BITS);
  localparam int Bins = (CONVERSION == lns_pkg::ConversionBin) ? (1 << TABLE_BITS) : 1;

  logic sign, zero;
  logic [P_BITS-1:0] code;
  logic [STATE_BITS-1:0] acc_next;

  lns_mul #(
      .A_BITS(A_BITS),
      .A_SIGNED(A_SIGNED),
      .A_SCALE(A_SCALE),
      .W_BITS(W_BITS),
      .W_SIGNED(W_SIGNED),
      .W_SCALE(W_SCALE),
      .P_BITS(P_BITS)
  ) i_mul (
      .a_i(a_i),
      .w_i(w_i),
      .sign_o(sign),
      .zero_o(zero),
      .code_o(code)
  );

  generate
    if (LOG != 0) begin : gen_log
      logic [ACC_BITS-1:0] entered;
      lns_enter #(
          .CODE_BITS(P_BITS),
          .SCALE_BITS(SCALE_BITS),
          .GUARD(GUARD),
          .ACC_BITS(ACC_BITS)
      ) i_enter (
          .code_i(code),
          .zero_i(zero),
          .scale_i(scale_i),
          .code_o(entered)
      );
      lns_add #(
          .BITS(ACC_BITS),
          .DELTA_BITS(DELTA_BITS)
      ) i_add (
          .x_sign_i(acc_o[ACC_BITS]),
          .x_code_i(acc_o[ACC_BITS-1:0]),
          .y_sign_i(sign & (entered != '0)),
          .y_code_i(entered),
          .sign_o(acc_next[ACC_BITS]),
          .code_o(acc_next[ACC_BITS-1:0])
      );
    end else begin : gen_linear
      logic [TERM_BITS-1:0] magnitude;
      logic [BinBits-1:0] bin;
      lns_term #(
          .P_BITS(P_BITS),
          .F(F),
          .TABLE_BITS(TABLE_BITS),
          .CONST_BITS(CONST_BITS),
          .CONVERSION(CONVERSION),
          .SHIFT(SHIFT),
          .ALIGN_BITS(SCALE_BITS),
          .TERM_BITS(TERM_BITS)
      ) i_term (
          .code_i(code),
          .zero_i(zero),
          .align_i(scale_i),
          .magnitude_o(magnitude),
          .bin_o(bin)
      );
      lns_lin_step #(
          .LANES(1),
          .TERM_BITS(TERM_BITS),
          .BINS(Bins),
          .BIN_BITS(BinBits),
          .PSUM_BITS(PSUM_BITS),
          .ACC_BITS(ACC_BITS),
          .OVERFLOW(OVERFLOW)
      ) i_step (
          .terms_i({bin, sign, magnitude}),
          .acc_i(acc_o),
          .acc_o(acc_next)
      );
    end
  endgenerate

  always_ff @(posedge clk_i) begin
    if (!rst_ni) acc_o <= '0;
    else if (valid_i) acc_o <= acc_next;
  end

endmodule
