"""Highest memory of the process by phase: what loading, prefill and decode each needed at most."""

import torch

from service import device as devices
from service.messages import StepStats

WORTH_TELLING_BYTES = 1 << 20
DECODE_STEPS = 32  # a look takes longer than all else that the host does in a small step


class PeakWatch:
    """Looks after each step with prompts in it, after the first decode step behind one and then now and then.

    Where the system cannot begin a new peak, only the one of loading is known.
    """

    def __init__(self, device: torch.device, load_bytes: int) -> None:
        self._device = device
        self._peaks = {"load": load_bytes}
        self._works = devices.reset_memory_peak(device)
        self._num_decode_steps = 0

    def after(self, stats: StepStats) -> dict[str, int] | None:
        """-> all peaks where this step has raised one by 1 MiB, else None."""
        if not self._works or not (stats.num_prefill_tokens or stats.num_decode_tokens):
            return None
        phase = "prefill" if stats.num_prefill_tokens else "decode"
        if phase == "prefill":
            self._num_decode_steps = 0
        else:
            self._num_decode_steps += 1
            if self._num_decode_steps % DECODE_STEPS != 1:
                return None
        peak = devices.memory_peak_bytes(self._device)
        devices.reset_memory_peak(self._device)
        if peak < self._peaks.get(phase, 0) + WORTH_TELLING_BYTES:
            return None
        self._peaks[phase] = peak
        return dict(self._peaks)
