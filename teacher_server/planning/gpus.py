"""What GPUs can do at most, and which share of it a plan assumes. Needs no torch."""

from dataclasses import dataclass, replace

GIB = 1 << 30
THIS_MACHINE = "cpu"
"""The device whose peak is measured when a plan is made: one product on this machine."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Holds the figures of one kind of GPU."""

    name: str
    tflops: float
    """Dense bfloat16 products with float32 sums, without sparsity, in 1e12 operations per second."""
    float32_tflops: float
    """The same in float32, which torch does not round to TF32 by default."""
    memory_gib: float
    """What a process can allocate, which is a little less than the name says."""
    bandwidth_gb_s: float
    """Of its memory, in 1e9 bytes per second."""
    link_gb_s: float
    """To its neighbours on the same machine, in one direction, in 1e9 bytes per second."""
    efficiency: float
    """Share of `tflops` that is assumed where nothing was measured."""
    efficiency_source: str

    def for_dtype(self, dtype: str) -> "Gpu":
        """Returns the same with the peak of this dtype in `tflops`."""
        return replace(self, tflops=self.float32_tflops) if dtype == "float32" else self


# Published shares of the peak are of training, whose products are the same but which also waits for
# its network. Nothing here was measured with logitstream.
A100_SOURCE = "Narayanan et al. 2021 (Megatron-LM): 44 to 52 % of an A100's peak in training"
H100_SOURCE = "Llama Team 2024 (Llama 3): 38 to 43 % of an H100's peak in training"
NO_SOURCE = "a guess"

GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 data sheet: 312 TFLOPS, 80 GB at 2,039 GB/s (SXM) or 40 GB at 1,555; NVLink 600
        # GB/s in both directions together.
        Gpu("a100", 312, 19.5, 79.1, 2039, 300, 0.48, A100_SOURCE),
        Gpu("a100-40gb", 312, 19.5, 39.4, 1555, 300, 0.48, A100_SOURCE),
        # NVIDIA H100 data sheet: 1,979 TFLOPS with sparsity, 80 GB at 3.35 TB/s, NVLink 900 GB/s (SXM);
        # 1,513, 2 TB/s, PCIe 5 (PCIe).
        Gpu("h100", 989.4, 66.9, 79.1, 3350, 450, 0.40, H100_SOURCE),
        Gpu("h100-pcie", 756, 51.2, 79.1, 2000, 64, 0.40, H100_SOURCE),
        # NVIDIA H200 data sheet: the H100's processor, 141 GB at 4.8 TB/s.
        Gpu("h200", 989.4, 66.9, 139.8, 4800, 450, 0.40, H100_SOURCE),
        # NVIDIA HGX B200 data sheet: 4.5 PFLOPS with sparsity, 180 GB at 7.7 TB/s, NVLink 1.8 TB/s.
        Gpu("b200", 2250, 75, 178.4, 7700, 900, 0.35, NO_SOURCE),
        # NVIDIA L40S data sheet: 362 TFLOPS, 48 GB at 864 GB/s, PCIe 4.
        Gpu("l40s", 362, 91.6, 44.4, 864, 32, 0.40, NO_SOURCE),
        # NVIDIA L4 data sheet: 242 TFLOPS with sparsity, 24 GB at 300 GB/s, PCIe 4.
        Gpu("l4", 121, 30.3, 22.0, 300, 32, 0.40, NO_SOURCE),
        # NVIDIA A10 data sheet: 125 TFLOPS, 24 GB at 600 GB/s, PCIe 4.
        Gpu("a10", 125, 31.2, 22.0, 600, 32, 0.40, NO_SOURCE),
        # NVIDIA Ada GPU architecture paper: 165.2 TFLOPS with float32 sums, 24 GB at 1,008 GB/s, PCIe 4.
        Gpu("rtx4090", 165.2, 82.6, 23.5, 1008, 32, 0.40, NO_SOURCE),
    )
}
"""The link of PCIe 4 with 16 lanes has 32 GB/s in each direction, that of PCIe 5 has 64."""

NAMES = (*GPUS, THIS_MACHINE)


def find_gpu(device_name: str) -> Gpu | None:
    """Finds the kind of GPU that torch calls, for example, `NVIDIA H100 80GB HBM3`."""
    words = device_name.lower().replace("-", " ").split()
    joined = "".join(words)
    if "a100" in words and "40gb" in joined:
        return GPUS["a100-40gb"]
    if "h100" in words and "pcie" in words:
        return GPUS["h100-pcie"]
    if "4090" in words:
        return GPUS["rtx4090"]
    return next((GPUS[word] for word in words if word in GPUS), None)
