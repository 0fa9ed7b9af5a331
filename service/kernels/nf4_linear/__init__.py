"""NF4 linears of our own: on a CPU in C; elsewhere precision/nf4 calls bitsandbytes."""
