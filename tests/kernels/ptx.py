"""Inline PTX on a CPU: the few instructions that kernels use, on numpy arrays with an element a thread.

Kernels in Triton's interpreter, which leaves assembly out, run theirs by this: what is tested is what ships.
"""

import re
from typing import Any

import numpy as np
import torch

Words = np.ndarray  # uint32


def run(asm: str, constraints: str, inputs: list[np.ndarray]) -> list[Words]:
    """Elements narrower than 32 bits fill a register side by side -> output registers."""
    packed = [np.ascontiguousarray(array).reshape(-1).view(np.uint32) for array in inputs]
    num_outputs = constraints.count("=")
    registers: dict[str, Words] = {f"${num_outputs + i}": words for i, words in enumerate(packed)}
    for line in asm.strip(" {}").split(";"):
        opcode, _, rest = line.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        target, operands = split_operands(rest)
        values = [registers[name] if name in registers else np.uint32(int(name, 0)) for name in operands]
        if target.startswith("{"):
            assert opcode == "mov.b32"
            low, high = re.findall(r"\w+", target)
            registers[low], registers[high] = values[0] & 0xFFFF, values[0] >> 16
        else:
            registers[target] = INSTRUCTIONS[opcode](*values)
    return [registers[f"${i}"] for i in range(num_outputs)]


def split_operands(text: str) -> tuple[str, list[str]]:
    """`{a, b}, c` or `a, b, c` -> the target, and the others."""
    found = re.match(r"(\{[^}]*\}|[^,]+),(.*)", text)
    assert found is not None
    return found[1].strip(), [name.strip() for name in found[2].split(",")]


def permuted(low: Words, high: Words, selector: Words) -> Words:
    """prmt.b32 in its usual mode: each nibble of the selector picks one of eight bytes."""
    pool = np.uint64(1) * low | np.uint64(1) * high << np.uint64(32)
    result = np.uint64(0)
    for byte in range(4):
        place = np.uint64((int(selector) >> 4 * byte & 7) * 8)
        assert not int(selector) >> 4 * byte & 8, "a byte's sign is not needed so far"
        result = result | (pool >> place & np.uint64(0xFF)) << np.uint64(8 * byte)
    return np.asarray(result).astype(np.uint32)


def subtracted(left: Words, right: Words) -> Words:
    a, b = (np.atleast_1d(np.asarray(words, np.uint32)).view(np.float16) for words in (left, right))
    return (a.reshape(-1, 2) - b.reshape(-1, 2)).reshape(-1).view(np.uint32)


def widened(codes: Words) -> Words:
    """Two E4M3 in the low 16 bits -> two float16."""
    pairs = torch.from_numpy(codes.astype(np.uint16)).view(torch.float8_e4m3fn)
    halves: Words = pairs.to(torch.float16).view(torch.int32).numpy().view(np.uint32)
    return halves


INSTRUCTIONS: dict[str, Any] = {
    "xor.b32": lambda a, b: a ^ b,
    "mov.b32": lambda a: a,
    "prmt.b32": permuted,
    "sub.rn.f16x2": subtracted,
    "cvt.rn.f16x2.e4m3x2": widened,
}
