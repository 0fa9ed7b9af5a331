"""`halftone bench --kernels`: the linears of one layer in every precision, beside other libraries' kernels.

cli/kernels --Plan--> measure --contestants, reading--> result (JSON) --table--> terminal
"""
