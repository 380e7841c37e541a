// SPDX-License-Identifier: Apache-2.0
//
// Output-stationary array of ROWS x COLS processing elements with its buffers and a controller: it runs a whole
// matrix product Y[M, N] = A[M, K] W[N, K] by tiles of ROWS x COLS (7.1, 7.2). The order of K is that of a single element, so
// every datapath keeps its bits (7.3).
//
// Commands (valid/ready; while a product runs, ready is low):
//   op 0  write activations: the ROWS x LANES words of k-move addr % KSTEPS_MAX of row tile addr / KSTEPS_MAX
//   op 1  write weights:     the COLS x LANES words, likewise of column tiles
//   op 2  write a column tile's {offset, scale, bias} of each of its COLS channels
//   op 3  run addr row tiles x data[15:0] column tiles of data[31:16] k-steps
// Results: a tile a beat, all rows of column 0 first; column tiles run fastest.

module lns_array #(
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
    parameter int PIPE_TERMS   = 1,
    // Array
    parameter int ROWS         = 4,
    parameter int COLS         = 4,
    parameter int KSTEPS_LOG2  = 6,   // k-steps that a tile's buffer holds
    parameter int ATILES_LOG2  = 2,   // tiles that the activation buffer holds
    parameter int WTILES_LOG2  = 2,   // tiles that the weight buffer holds
    // Do not change: follow from the parameters.
    parameter int CHANNEL_BITS = OFFSET_BITS + SCALE_BITS + ACC_BITS + 1,
    parameter int DATA_BITS    = lns_pkg::larger(
        lns_pkg::larger(ROWS * LANES * A_BITS, COLS * LANES * W_BITS), lns_pkg::larger(COLS * CHANNEL_BITS, 32)
    )
) (
    input  logic                          clk_i,
    input  logic                          rst_ni,
    input  logic                          cmd_valid_i,
    output logic                          cmd_ready_o,
    input  logic [1:0]                    cmd_op_i,
    input  logic [15:0]                   cmd_addr_i,
    input  logic [DATA_BITS-1:0]          cmd_data_i,
    output logic                          y_valid_o,
    input  logic                          y_ready_i,
    output logic [COLS*ROWS*OUT_BITS-1:0] y_o
);

  // Do not change: follow from the parameters.
  localparam int AAddr = KSTEPS_LOG2 + ATILES_LOG2;
  localparam int WAddr = KSTEPS_LOG2 + WTILES_LOG2;

  logic [ROWS*LANES*A_BITS-1:0] a_mem[1<<AAddr];
  logic [COLS*LANES*W_BITS-1:0] w_mem[1<<WAddr];
  logic [COLS*CHANNEL_BITS-1:0] c_mem[1<<WTILES_LOG2];

  logic [ROWS*LANES*A_BITS-1:0] a_q;
  logic [COLS*LANES*W_BITS-1:0] w_q;
  logic [COLS*CHANNEL_BITS-1:0] c_q;

  logic running, fed_q, first_q, last_q, accept, move, pe_ready, out_valid;
  logic [15:0] rows_left, cols, cols_left, steps, k;
  logic [ATILES_LOG2-1:0] row;
  logic [WTILES_LOG2-1:0] col;
  logic [COLS*ROWS-1:0] ready, valid;

  assign cmd_ready_o = !running && !fed_q;
  assign accept      = cmd_valid_i && cmd_ready_o;
  assign pe_ready    = ready[0];  // the elements move in move
  assign out_valid   = valid[0];
  assign y_valid_o   = out_valid;
  assign move        = running && (!fed_q || pe_ready);

  always_ff @(posedge clk_i) begin
    if (accept && cmd_op_i == 2'd0) a_mem[cmd_addr_i[AAddr-1:0]] <= cmd_data_i[ROWS*LANES*A_BITS-1:0];
    if (accept && cmd_op_i == 2'd1) w_mem[cmd_addr_i[WAddr-1:0]] <= cmd_data_i[COLS*LANES*W_BITS-1:0];
    if (accept && cmd_op_i == 2'd2) c_mem[cmd_addr_i[WTILES_LOG2-1:0]] <= cmd_data_i[COLS*CHANNEL_BITS-1:0];
    if (move) begin
      a_q <= a_mem[{row, k[KSTEPS_LOG2-1:0]}];
      w_q <= w_mem[{col, k[KSTEPS_LOG2-1:0]}];
      c_q <= c_mem[col];
    end
  end

  // Three nested loops: row tiles, column tiles, k-steps
  always_ff @(posedge clk_i) begin
    if (!rst_ni) begin
      running <= 1'b0;
      fed_q   <= 1'b0;
    end else begin
      if (accept && cmd_op_i == 2'd3) begin
        running   <= 1'b1;
        rows_left <= cmd_addr_i - 1;
        cols      <= cmd_data_i[15:0] - 1;
        cols_left <= cmd_data_i[15:0] - 1;
        steps     <= cmd_data_i[31:16] - 1;
        k         <= '0;
        row       <= '0;
        col       <= '0;
      end
      if (move) begin
        first_q <= k == '0;
        last_q  <= k == steps;
        if (k != steps) begin
          k <= k + 1;
        end else begin
          k <= '0;
          if (cols_left != '0) begin
            cols_left <= cols_left - 1;
            col       <= col + 1;
          end else begin
            cols_left <= cols;
            col       <= '0;
            row       <= row + 1;
            if (rows_left == '0) running <= 1'b0;
            rows_left <= rows_left - 1;
          end
        end
      end
      if (move) fed_q <= 1'b1;
      else if (pe_ready) fed_q <= 1'b0;
    end
  end

  genvar r, c;
  generate
    for (c = 0; c < COLS; c = c + 1) begin : gen_col
      logic [CHANNEL_BITS-1:0] channel;
      assign channel = c_q[c*CHANNEL_BITS+:CHANNEL_BITS];
      for (r = 0; r < ROWS; r = r + 1) begin : gen_row
        lns_pe #(
              .A_BITS(A_BITS),
              .A_SIGNED(A_SIGNED),
              .A_SCALE(A_SCALE),
              .W_BITS(W_BITS),
              .W_SIGNED(W_SIGNED),
              .W_SCALE(W_SCALE),
              .P_BITS(P_BITS),
              .OUT_BITS(OUT_BITS),
              .OUT_SIGNED(OUT_SIGNED),
              .UNDERFLOW(UNDERFLOW),
              .LOG(LOG),
              .LANES(LANES),
              .ACC_BITS(ACC_BITS),
              .SCALE_BITS(SCALE_BITS),
              .OFFSET_BITS(OFFSET_BITS),
              .F(F),
              .TABLE_BITS(TABLE_BITS),
              .CONST_BITS(CONST_BITS),
              .CONVERSION(CONVERSION),
              .SHIFT(SHIFT),
              .TERM_BITS(TERM_BITS),
              .PSUM_BITS(PSUM_BITS),
              .TOTAL_BITS(TOTAL_BITS),
              .OVERFLOW(OVERFLOW),
              .ENCODER(ENCODER),
              .ENCODER_BITS(ENCODER_BITS),
              .GUARD(GUARD),
              .DELTA_BITS(DELTA_BITS),
              .PIPE_TERMS(PIPE_TERMS)
        ) i_pe (
            .clk_i(clk_i),
            .rst_ni(rst_ni),
            .in_valid_i(fed_q),
            .in_ready_o(ready[c*ROWS+r]),
            .first_i(first_q),
            .last_i(last_q),
            .a_i(a_q[r*LANES*A_BITS+:LANES*A_BITS]),
            .w_i(w_q[c*LANES*W_BITS+:LANES*W_BITS]),
            .bias_i(channel[ACC_BITS:0]),
            .scale_i($signed(channel[ACC_BITS+1+:SCALE_BITS])),
            .offset_i($signed(channel[ACC_BITS+1+SCALE_BITS+:OFFSET_BITS])),
            .out_valid_o(valid[c*ROWS+r]),
            .out_ready_i(y_ready_i),
            .y_o(y_o[(c*ROWS+r)*OUT_BITS+:OUT_BITS])
        );
      end
    end
  endgenerate

endmodule
