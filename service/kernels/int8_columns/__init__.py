"""Columns with outliers among rows of x on CUDA, for kernels/int8_rows."""
