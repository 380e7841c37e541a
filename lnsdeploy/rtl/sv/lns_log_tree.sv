// SPDX-License-Identifier: Apache-2.0
//
// Balanced tree of LNS adders over LANES words (5.4): pairs (0,1), (2,3), ... first; of an odd count the last passes.

module lns_log_tree #(
    parameter int LANES      = 4,
    parameter int BITS       = 7,
    parameter int DELTA_BITS = 4,
    parameter int DELTA      = 0
) (
    input  logic [LANES*(BITS+1)-1:0] words_i,  // of each lane {sign, code}
    output logic [BITS:0]             word_o
);

  generate
    if (LANES == 1) begin : gen_leaf
      assign word_o = words_i;
    end else begin : gen_node
      // Do not change: follow from the parameters.
      localparam int Left = 1 << ($clog2(LANES) - 1);
      localparam int Right = LANES - Left;
      logic [BITS:0] left, right;
      lns_log_tree #(
          .LANES(Left),
          .BITS(BITS),
          .DELTA_BITS(DELTA_BITS),
          .DELTA(DELTA)
      ) i_left (
          .words_i(words_i[Left*(BITS+1)-1:0]),
          .word_o(left)
      );
      lns_log_tree #(
          .LANES(Right),
          .BITS(BITS),
          .DELTA_BITS(DELTA_BITS),
          .DELTA(DELTA)
      ) i_right (
          .words_i(words_i[LANES*(BITS+1)-1:Left*(BITS+1)]),
          .word_o(right)
      );
      lns_add #(
          .BITS(BITS),
          .DELTA_BITS(DELTA_BITS),
          .DELTA(DELTA)
      ) i_add (
          .x_sign_i(left[BITS]),
          .x_code_i(left[BITS-1:0]),
          .y_sign_i(right[BITS]),
          .y_code_i(right[BITS-1:0]),
          .sign_o(word_o[BITS]),
          .code_o(word_o[BITS-1:0])
      );
    end
  endgenerate

endmodule
