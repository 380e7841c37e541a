"""What a datapath's units cost in hardware, beside int8, int4, fp8 and bf16 written the same way (docs/cost.md)."""
