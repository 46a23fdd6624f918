"""Finds out what the device at hand can do."""

import math
import os
import time

import torch

from teacher_server.errors import ModelError
from teacher_server.planning.gpus import GIB, GPUS, THIS_MACHINE, Gpu, find_gpu

PRODUCT = 2048
"""Rows and columns of the product whose speed is taken as a CPU's peak."""
PEAK_SOURCE = f"of a product of {PRODUCT} x {PRODUCT} on this machine"


def describe_cpu(dtype: str) -> Gpu:
    """Describes this machine's CPU; its peak is measured, in less than a second."""
    tflops = _measure_peak(getattr(torch, dtype)) / 1e12
    return Gpu(
        name=THIS_MACHINE,
        tflops=tflops,
        float32_tflops=tflops,
        memory_gib=free_memory("cpu") / GIB,
        bandwidth_gb_s=0.0,
        link_gb_s=0.0,
        efficiency=0.5,
        efficiency_source="a guess",
    )


def find_device(wanted: str, dtype: str) -> Gpu:
    """Describes what --measure measures on. Raises ModelError if that is not what is wanted.

    wanted: the kind of GPU that was asked for, if any.
    """
    if not torch.cuda.is_available():
        if wanted not in ("", THIS_MACHINE):
            raise ModelError(
                f"--measure measures the device at hand, and torch finds no CUDA device here: it says "
                f"nothing of a {wanted}. Run it there, or leave --gpu or --measure away."
            )
        return describe_cpu(dtype)
    if wanted == THIS_MACHINE:
        return describe_cpu(dtype)
    name = torch.cuda.get_device_name()
    gpu = find_gpu(name)
    if gpu is None and wanted:
        return GPUS[wanted]
    if gpu is None or wanted not in ("", gpu.name):
        raise ModelError(
            f"--measure measures the device at hand, {name}"
            + (
                f", and not a {wanted}. Leave --gpu away."
                if gpu
                else f", whose peak is not known. Give the nearest one with --gpu: {', '.join(GPUS)}."
            )
        )
    return gpu


def free_memory(device_type: str) -> float:
    """Returns how much memory can be allocated, in bytes."""
    if device_type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo", encoding="ascii") as lines:
        values = dict(line.split(":", 1) for line in lines)
    available = int(values["MemAvailable"].split()[0]) * 1024.0
    return min(available, _cgroup_limit())


def _cgroup_limit() -> float:
    """Returns the limit of a container, if it has one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
            if text.isdigit():
                return float(text)
    return math.inf


def _measure_peak(dtype: torch.dtype) -> float:
    """Returns operations per second of the fastest of a few products."""
    left, right = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = math.inf
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds = min(seconds, time.perf_counter() - began)
    return 2 * PRODUCT**3 / seconds
