// SPDX-License-Identifier: Apache-2.0
//
// A clock for Verilator: everything else is in lns_tb.sv.

#include "Vlns_tb.h"
#include "verilated.h"

int main(int argc, char** argv) {
  VerilatedContext context;
  context.commandArgs(argc, argv);
  Vlns_tb top{&context};
  top.clk_i = 0;
  top.eval();
  while (!context.gotFinish()) {
    context.timeInc(1);
    top.clk_i = !top.clk_i;
    top.eval();
  }
  top.final();
  return 0;
}
