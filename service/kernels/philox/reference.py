"""The definition, in torch, on int64 tensors that hold 32-bit words."""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio; sqrt(3) - 1
NUM_ROUNDS = 10
WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """int64 [4, n], int64 [2, n], words in 0..2^32-1 -> int64 [4, n], words in 0..2^32-1."""
    multipliers = torch.tensor(MULTIPLIERS, device=counter.device).unsqueeze(1)
    key_steps = torch.tensor(KEY_STEPS, device=counter.device).unsqueeze(1)
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2; words 1 and 3
    for round_index in range(NUM_ROUNDS):
        # A product of two words needs 64 unsigned bits. int64 keeps the right ones, since it wraps; the
        # shift drags the sign along, which the mask takes off again.
        product = even * multipliers
        round_key = (key + key_steps * round_index) & WORD
        even = ((product >> 32) & WORD).flip(0) ^ odd ^ round_key
        odd = (product & WORD).flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seed: Tensor, position: Tensor, sample_index: Tensor, stream: int = 0) -> Tensor:
    """int64 [n] each; the seed is any 64 bits -> float64 [n] in the open interval (0, 1)."""
    zero = torch.zeros_like(position)
    counter = torch.stack((position, sample_index, zero + stream, zero))
    key = torch.stack((seed & WORD, (seed >> 32) & WORD))
    return (philox4x32(counter, key)[0].double() + 0.5) * 2.0**-32
