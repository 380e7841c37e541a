"""The hardware: a SystemVerilog library (`sv/`), the tables and tops generated for a datapath, and its simulation.

The library's files are written by hand; :mod:`lnsdeploy.rtl.roms` generates the tables, from the same objects as the
emulator's, :mod:`lnsdeploy.rtl.designs` a top for a unit, :mod:`lnsdeploy.rtl.simulate` runs it in Verilator or Icarus.
"""
