"""The names that settings, messages and reports have for torch's types."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # beside that of activations
DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | KV_DTYPES).items()}
