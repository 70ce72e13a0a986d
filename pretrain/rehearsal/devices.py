"""The device that a rank computes on: how many ranks share its host, and how much of it the rank has taken."""

from __future__ import annotations

import socket

import torch

from pretrain import hostmemory
from pretrain.ranks.collectives import all_gather_list


def host_ranks() -> int:
    """How many ranks this host has. Collective."""
    here = socket.gethostname()
    return all_gather_list([here]).count(here)


class Meter:
    """The memory that this process takes of its device, from when the meter is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cpu":
            hostmemory.restart_peak()
        self.resting = 0 if device.type != "cpu" else hostmemory.resident_memory()

    def peak(self) -> int:
        """The most bytes taken at a time: of the device, torch's and what lies outside it; of a CPU, of this process
        beyond what it took at rest.
        """
        if self._device.type == "cpu":
            return hostmemory.peak_memory() - self.resting
        module = torch.get_device_module(self._device)
        free, total = module.mem_get_info(self._device)
        outside = total - free - module.memory_reserved(self._device)
        return int(module.max_memory_reserved(self._device) + outside)
