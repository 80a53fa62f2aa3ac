"""The TPU chips that a plan knows: memory as XLA states it, and peaks as Google Cloud's pages state them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. A chip is one device for JAX, or two; all figures but those of links are of one device.

    Attributes:
        memory: HBM in bytes, as the vendor states it.
        usable: bytes that XLA lets a program use, as its error messages state it.
        dimensions: number of sides in the shape of a slice.
        pod: number of chips in the largest slice.
        flops: peak FLOP/s of matrix products in bfloat16.
        integer_ops: peak operations per second of matrix products in int8.
        bandwidth: bytes per second between HBM and the chip.
        link: bytes per second that a chip sends over one link of the interconnect (ICI). A chip has two links for each
            dimension.
        dcn: bytes per second that a chip sends over the data centre's network, or None if the vendor states no figure.
        source: where the peaks stand.
        devices: devices per chip.
        options: options for `get_topology_desc`. On v4, they make the two cores of a chip one device.
    """

    memory: float
    usable: int
    dimensions: int
    pod: int
    flops: float
    integer_ops: float
    bandwidth: float
    link: float
    dcn: float | None
    source: str
    devices: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def ici(self, sides: Sequence[int]) -> float:
        """Bytes per second that a chip of a slice sends at most, over all its links inside the slice.

        A side of two chips has one link between them. Longer sides count as rings, which small slices do not close.
        """
        return self.link * sum(min(side - 1, 2) for side in sides)


# ICI: the pages state the sum of both directions of all links (4 on v5e and v6e, 6 on the others), `link` is one
# direction of one. v4: 50 GB/s a link, arXiv 2304.01433. int8 on v5p: JAX's table `pallas.tpu.TpuInfo`; Google's page
# has none. int8 on TPU7x: the figure of FP8, the most that may be. DCN on v5e: 6.4 Tb/s a pod of 256 chips.
_PAGES = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    "v4": Chip(
        32e9, int(30.75 * GIB), 3, 4096, 275e12, 275e12, 1200e9, 50e9, None, f"{_PAGES}v4",
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(16e9, int(15.75 * GIB), 2, 256, 197e12, 393e12, 819e9, 50e9, 25e9 / 8, f"{_PAGES}v5e"),
    "v5p": Chip(95e9, int(95.74 * GIB), 3, 6144, 459e12, 918e12, 2765e9, 100e9, 50e9 / 8, f"{_PAGES}v5p"),
    "v6e": Chip(32e9, int(31.25 * GIB), 2, 256, 918e12, 1836e12, 1638e9, 100e9, 100e9 / 8, f"{_PAGES}v6e"),
    "tpu7x": Chip(
        96e9, int(94.75 * GIB), 3, 9216, 2307e12 / 2, 4614e12 / 2, 7380e9 / 2, 100e9, 100e9 / 8, f"{_PAGES}tpu7x",
        devices=2,
    ),
}  # fmt: skip
