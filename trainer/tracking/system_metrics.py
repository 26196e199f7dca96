"""The load of this machine, under the names that MLflow shows as system metrics."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import psutil

from trainer.tracking.journal import SYSTEM

log = logging.getLogger(__name__)

MEGABYTE = 1e6


class SystemMetrics:
    """Processor, memory, disk of the run folder, network, and GPUs where ``pynvml`` (nvidia-ml-py) is installed.

    Percentages are 0 to 100; megabytes are 10^6 bytes; network counts from the construction on; power is in watts.
    """

    def __init__(self, folder: Path, seconds: float = 10.0) -> None:
        self.folder, self.seconds = folder, seconds
        self._next = time.monotonic() + min(1.0, seconds)  # a load needs some time to be measured over
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # its next call says how busy the processor was since this one
        self._gpus = _gpus()

    def due(self) -> dict[str, float]:
        """A sample if `seconds` have passed since the last one, otherwise nothing."""
        now = time.monotonic()
        if now < self._next:
            return {}
        self._next = now + self.seconds
        return {SYSTEM + name: float(value) for name, value in {**self._machine(), **self._all_gpus()}.items()}

    def _machine(self) -> dict[str, float]:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(self.folder)), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MEGABYTE,
        }
        if network is not None and self._network is not None:  # None: a machine without network interfaces
            values["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MEGABYTE
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MEGABYTE
        return values

    def _all_gpus(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if not self._gpus:
            return values
        import pynvml

        for place, gpu in enumerate(self._gpus):
            try:
                memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
                values[f"gpu_{place}_memory_usage_megabytes"] = memory.used / MEGABYTE
                values[f"gpu_{place}_memory_usage_percentage"] = 100 * memory.used / memory.total
                values[f"gpu_{place}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                values[f"gpu_{place}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
            except pynvml.NVMLError as error:  # not every GPU measures everything
                log.debug("GPU %d: %s", place, error)
        return values


def _gpus() -> list[object]:
    """NVML's handles of this machine's GPUs; none without the library or a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        log.debug("no GPU metrics: %s", error)
        return []
