// SPDX-License-Identifier: Apache-2.0
//
// Vector processing element: LANES products a beat, accumulated in the linear (4) or the logarithmic domain (5), encoded
// into a word after the beat that is marked last. K runs in order; pad it with zero words.
//
// bias_i is taken with the first beat: an integer of ACC_BITS already fitted (4.5), or {sign, code} (5.5).
// scale_i: F + lambda of lns_term, or S_n - o_acc of lns_enter. offset_i: see lns_lin_finish or lns_log_finish.
// Both must hold for all beats of a product. A stalled output stalls everything (valid/ready; nothing is lost).
// Latency 2 clocks after the last beat, 3 with PIPE_TERMS.

module lns_pe #(
    // Words (1, 3)
    parameter int A_BITS       = 8,
    parameter int A_SIGNED     = 1,
    parameter int A_SCALE      = 1,
    parameter int W_BITS       = 8,
    parameter int W_SIGNED     = 1,
    parameter int W_SCALE      = 1,
    parameter int P_BITS       = 8,
    parameter int OUT_BITS     = 8,
    parameter int OUT_SIGNED   = 1,
    parameter int UNDERFLOW    = lns_pkg::UnderflowZero,
    // Accumulation: linear (4) or, with LOG = 1, logarithmic (5)
    parameter int LOG          = 0,
    parameter int LANES        = 1,
    parameter int ACC_BITS     = 24,
    parameter int SCALE_BITS   = 8,
    parameter int OFFSET_BITS  = 12,
    // Linear accumulation only
    parameter int F            = 3,
    parameter int TABLE_BITS   = 3,
    parameter int CONST_BITS   = 8,
    parameter int CONVERSION   = lns_pkg::ConversionProduct,
    parameter int SHIFT        = lns_pkg::ShiftTruncate,
    parameter int TERM_BITS    = 24,
    parameter int PSUM_BITS    = 24,
    parameter int TOTAL_BITS   = 24,
    parameter int OVERFLOW     = lns_pkg::OverflowSaturate,
    parameter int ENCODER      = lns_pkg::EncoderExact,
    parameter int ENCODER_BITS = 4,
    // Log accumulation only
    parameter int GUARD        = 0,
    parameter int DELTA_BITS   = 4,
    // Registers between the products and their sum
    parameter int PIPE_TERMS   = 1
) (
    input  logic                          clk_i,
    input  logic                          rst_ni,
    input  logic                          in_valid_i,
    output logic                          in_ready_o,
    input  logic                          first_i,
    input  logic                          last_i,
    input  logic        [LANES*A_BITS-1:0] a_i,
    input  logic        [LANES*W_BITS-1:0] w_i,
    input  logic        [ACC_BITS:0]      bias_i,
    input  logic signed [SCALE_BITS-1:0]  scale_i,
    input  logic signed [OFFSET_BITS-1:0] offset_i,
    output logic                          out_valid_o,
    input  logic                          out_ready_i,
    output logic        [OUT_BITS-1:0]    y_o
);

  // Do not change: follow from the parameters.
  localparam int BinBits = lns_pkg::at_least_one(TABLE_BITS);
  localparam int Bins = (LOG == 0 && CONVERSION == lns_pkg::ConversionBin) ? (1 << TABLE_BITS) : 1;
  localparam int LaneBits = (LOG != 0) ? ACC_BITS + 1 : TERM_BITS + 1 + BinBits;
  localparam int AccBits = (LOG != 0) ? ACC_BITS + 1 : Bins * ACC_BITS;

  logic [LANES*LaneBits-1:0] terms, terms_now;
  logic [AccBits-1:0] acc_q, acc_before, acc_start, acc_after;
  logic signed [OFFSET_BITS-1:0] offset_now, offset_q;
  logic [ACC_BITS:0] bias_now;
  logic [OUT_BITS-1:0] word;
  logic valid_now, first_now, last_now, done_q, advance;

  assign advance    = !out_valid_o || out_ready_i;
  assign in_ready_o = advance;

  // Products
  genvar l;
  generate
    for (l = 0; l < LANES; l = l + 1) begin : gen_lane
      logic sign, zero;
      logic [P_BITS-1:0] code;
      lns_mul #(
          .A_BITS(A_BITS),
          .A_SIGNED(A_SIGNED),
          .A_SCALE(A_SCALE),
          .W_BITS(W_BITS),
          .W_SIGNED(W_SIGNED),
          .W_SCALE(W_SCALE),
          .P_BITS(P_BITS)
      ) i_mul (
          .a_i(a_i[l*A_BITS+:A_BITS]),
          .w_i(w_i[l*W_BITS+:W_BITS]),
          .sign_o(sign),
          .zero_o(zero),
          .code_o(code)
      );
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
        assign terms[l*LaneBits+:LaneBits] = {sign & (entered != '0), entered};
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
        assign terms[l*LaneBits+:LaneBits] = {bin, sign, magnitude};
      end
    end

    if (PIPE_TERMS != 0) begin : gen_terms_register
      always_ff @(posedge clk_i) begin
        if (!rst_ni) valid_now <= 1'b0;
        else if (advance) valid_now <= in_valid_i;
        if (advance && in_valid_i) begin
          first_now  <= first_i;
          last_now   <= last_i;
          terms_now  <= terms;
          bias_now   <= bias_i;
          offset_now <= offset_i;
        end
      end
    end else begin : gen_terms_wire
      assign valid_now  = in_valid_i;
      assign first_now  = first_i;
      assign last_now   = last_i;
      assign terms_now  = terms;
      assign bias_now   = bias_i;
      assign offset_now = offset_i;
    end

    // Sum, and accumulator
    if (LOG != 0) begin : gen_log_step
      logic [ACC_BITS:0] step_sum;
      lns_log_tree #(
          .LANES(LANES),
          .BITS(ACC_BITS),
          .DELTA_BITS(DELTA_BITS)
      ) i_tree (
          .words_i(terms_now),
          .word_o(step_sum)
      );
      assign acc_start = bias_now;
      lns_add #(
          .BITS(ACC_BITS),
          .DELTA_BITS(DELTA_BITS)
      ) i_add (
          .x_sign_i(acc_before[ACC_BITS]),
          .x_code_i(acc_before[ACC_BITS-1:0]),
          .y_sign_i(step_sum[ACC_BITS]),
          .y_code_i(step_sum[ACC_BITS-1:0]),
          .sign_o(acc_after[ACC_BITS]),
          .code_o(acc_after[ACC_BITS-1:0])
      );
      lns_log_finish #(
          .ACC_BITS(ACC_BITS),
          .GUARD(GUARD),
          .OFFSET_BITS(OFFSET_BITS),
          .OUT_BITS(OUT_BITS),
          .OUT_SIGNED(OUT_SIGNED),
          .UNDERFLOW(UNDERFLOW)
      ) i_finish (
          .acc_i(acc_q),
          .offset_i(offset_q),
          .word_o(word)
      );
    end else begin : gen_linear_step
      assign acc_start = AccBits'(bias_now[ACC_BITS-1:0]);
      lns_lin_step #(
          .LANES(LANES),
          .TERM_BITS(TERM_BITS),
          .BINS(Bins),
          .BIN_BITS(BinBits),
          .PSUM_BITS(PSUM_BITS),
          .ACC_BITS(ACC_BITS),
          .OVERFLOW(OVERFLOW)
      ) i_step (
          .terms_i(terms_now),
          .acc_i(acc_before),
          .acc_o(acc_after)
      );
      lns_lin_finish #(
          .F(F),
          .TABLE_BITS(TABLE_BITS),
          .CONST_BITS(CONST_BITS),
          .CONVERSION(CONVERSION),
          .ACC_BITS(ACC_BITS),
          .TOTAL_BITS(TOTAL_BITS),
          .ENCODER(ENCODER),
          .ENCODER_BITS(ENCODER_BITS),
          .OFFSET_BITS(OFFSET_BITS),
          .OUT_BITS(OUT_BITS),
          .OUT_SIGNED(OUT_SIGNED),
          .UNDERFLOW(UNDERFLOW)
      ) i_finish (
          .acc_i(acc_q),
          .offset_i(offset_q),
          .word_o(word)
      );
    end
  endgenerate

  assign acc_before = first_now ? acc_start : acc_q;

  always_ff @(posedge clk_i) begin
    if (!rst_ni) begin
      done_q      <= 1'b0;
      out_valid_o <= 1'b0;
    end else if (advance) begin
      done_q      <= valid_now & last_now;
      out_valid_o <= done_q;
    end
    if (advance && valid_now) begin
      acc_q    <= acc_after;
      offset_q <= offset_now;
    end
    if (advance && done_q) y_o <= word;
  end

endmodule
