// SPDX-License-Identifier: Apache-2.0
//
// Streams records of a binary file into lns_dut and compares what comes out with another, or writes it.
//   +in=FILE       records of ceil(IN_BITS / 8) bytes, big-endian, the value in the low bits
//   +expect=FILE   records of ceil(OUT_BITS / 8) bytes, likewise
//   +write=FILE    instead: the outputs as hexadecimal lines
//   +count=N       outputs there must be, no fewer and no more
//   +stall         valid and ready at random: nothing may be lost or doubled

module lns_tb #(
    parameter int IN_BITS  = 16,
    parameter int OUT_BITS = 8
) (
    input logic clk_i
);

  localparam int InBytes = (IN_BITS + 7) / 8;
  localparam int OutBytes = (OUT_BITS + 7) / 8;
  localparam int Patience = 1 << 20;

  string name;
  integer in_file, expect_file, write_file, got;
  integer count, seen, wrong, quiet;
  logic [8*InBytes-1:0] record, data;
  logic [8*OutBytes-1:0] expected;
  logic [31:0] random;
  logic [3:0] reset;
  logic stall, in_valid, in_ready, out_valid, out_ready, rst_n, ended;
  logic [OUT_BITS-1:0] out;

  assign rst_n = reset == '0;

  lns_dut i_dut (
      .clk_i(clk_i),
      .rst_ni(rst_n),
      .in_valid_i(in_valid),
      .in_ready_o(in_ready),
      .in_i(data[IN_BITS-1:0]),
      .out_valid_o(out_valid),
      .out_ready_i(out_ready),
      .out_o(out)
  );

  initial begin
    in_file     = 0;
    expect_file = 0;
    write_file  = 0;
    count       = 0;
    seen        = 0;
    wrong       = 0;
    quiet       = 0;
    reset       = '1;
    random      = 32'h2545f491;
    in_valid    = 1'b0;
    out_ready   = 1'b0;
    ended       = 1'b0;
    data        = '0;
    if ($value$plusargs("in=%s", name)) in_file = $fopen(name, "rb");
    if ($value$plusargs("expect=%s", name)) expect_file = $fopen(name, "rb");
    if ($value$plusargs("write=%s", name)) write_file = $fopen(name, "w");
    if (!$value$plusargs("count=%d", count)) count = 0;
    stall = $test$plusargs("stall") != 0;
    if (in_file == 0 || (expect_file == 0 && write_file == 0)) begin
      $display("lns_tb: +in=, and +expect= or +write= must name files");
      $fatal(1);
    end
  end

  always @(posedge clk_i) begin
    random <= {random[30:0], random[31] ^ random[21] ^ random[1] ^ random[0]};
    if (reset != '0) begin
      reset <= reset - 1;
    end else begin
      // In
      if (!in_valid || in_ready) begin
        if (ended || (stall && random[3])) begin
          in_valid <= 1'b0;
        end else begin
          got = $fread(record, in_file);
          in_valid <= got == InBytes;
          ended    <= got != InBytes;
          data     <= record;
        end
      end

      // Out
      out_ready <= !stall || random[7];
      quiet     <= (out_valid && out_ready) ? 0 : quiet + 1;
      if (out_valid && out_ready) begin
        seen <= seen + 1;
        if (write_file != 0) begin
          $fwrite(write_file, "%h\n", out);
        end else if (seen < count) begin
          got = $fread(expected, expect_file);
          if (got != OutBytes || out !== expected[OUT_BITS-1:0]) begin
            wrong <= wrong + 1;
            if (wrong < 5) $display("  output %0d: %h, expected %h", seen, out, expected[OUT_BITS-1:0]);
          end
        end
      end

      // Done: everything went in, everything came out, and nothing more for a while
      if (ended && seen >= count && quiet > 64 || quiet > Patience) begin
        if (write_file != 0) $fclose(write_file);
        $display("%0d outputs, %0d mismatches", seen, wrong);
        if (wrong != 0 || seen != count) begin
          if (seen != count) $display("  %0d outputs were expected", count);
          $fatal(1);
        end
        $finish;
      end
    end
  end

endmodule
