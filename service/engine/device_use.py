"""What all processes use of a GPU's memory, by NVML, which can be asked before there is a CUDA context.

early, startup --the device's UUID--> used_bytes --> ledger: what this process holds outside of torch
"""

import logging

logger = logging.getLogger(__name__)


def used_bytes(device_uuid: str) -> int | None:
    """None where NVML does not tell; the log says why."""
    import pynvml  # 20 ms that a CPU does without

    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device_uuid)
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        logger.warning("memory of `%s` outside of torch is not known: NVML: %s", device_uuid, error)
        return None
