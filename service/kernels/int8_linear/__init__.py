"""LLM.int8() linears of our own: on a CPU in C; elsewhere precision/int8 calls bitsandbytes."""
