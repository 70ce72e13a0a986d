"""The device that a rank computes on: how much memory it has, and how much of it the rank has taken."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from pretrain.ranks.collectives import all_gather_list

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory; of a CPU, what this host gives to all its ranks."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[1])
    limits = [psutil.virtual_memory().total]
    for file in _LIMITS:  # of a container
        with suppress(OSError, ValueError):  # "max"
            limits.append(int(file.read_text()))
    return min(limits)


def host_ranks() -> int:
    """How many ranks this host has. Collective."""
    here = socket.gethostname()
    return all_gather_list([here]).count(here)


class Meter:
    """The memory that this process takes of its device, from when the meter is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            if device.type == "cpu":
                _CLEAR.write_text("5")  # proc(5): resets the peak
        self.resting = 0 if device.type != "cpu" else psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most bytes taken at a time; of a CPU, beyond what was taken at rest."""
        if self._device.type == "cpu":
            return _highest() - self.resting
        module = torch.get_device_module(self._device)
        free, total = module.mem_get_info(self._device)
        outside = total - free - module.memory_reserved(self._device)
        return int(module.max_memory_reserved(self._device) + outside)


def _highest() -> int:
    """The process's largest resident size."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
