"""Device meshes with four named axes, from sizes such as "data=2,tensor=4"."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from emu3_jax.errors import Emu3Error
from emu3_jax.printable import shown

# Order matters: the devices of the last axes are neighbours. `sequence` and `tensor` communicate in every layer.
AXES = ("data", "fsdp", "sequence", "tensor")
_LEGAL = f"axes are {', '.join(AXES)}, each a whole number >= 1; one may be -1 for all remaining devices"


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with all axes of `AXES`. Axes that `sizes` does not name have size 1.

    If the devices belong to several TPU slices, `data` spans the slices, and all other axes lie inside of them.

    Args:
        sizes: sizes such as "data=2,fsdp=-1", or a mapping such as {"data": 2, "fsdp": -1}. Size -1 stands for all
            devices that the other axes leave.
        devices: devices to choose from; all devices by default. On a single host the mesh may use only the first ones.

    Raises:
        Emu3Error: an axis is unknown, a size is not legal, the product of the sizes does not divide the number of
            devices, a mesh over several hosts does not use all devices, or with several slices `data` is not a
            multiple of their number.
    """
    parsed = {**dict.fromkeys(AXES, 1), **parse(sizes)}
    devices = list(jax.devices() if devices is None else devices)
    described = ",".join(f"{axis}={size}" for axis, size in parsed.items() if size != 1) or "of one device"
    fixed = math.prod(size for size in parsed.values() if size != -1)
    if fixed > len(devices):
        available = "only 1 is" if len(devices) == 1 else f"only {len(devices)} are"
        raise Emu3Error(f"mesh {described} needs {fixed} devices, but {available} available: choose smaller axis sizes")
    if len(devices) % fixed:
        raise Emu3Error(
            f"mesh {described} needs {fixed} devices, which does not divide the {len(devices)} available devices: "
            "choose axis sizes whose product divides them"
        )
    parsed = {axis: len(devices) // fixed if size == -1 else size for axis, size in parsed.items()}
    count = math.prod(parsed.values())
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise Emu3Error(
            f"mesh {described} uses {count} of {len(devices)} devices: a mesh over several hosts must use all; "
            "set one axis to -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices[:count]})
    if parsed["data"] % slices:
        raise Emu3Error(
            f"mesh {described} has data={parsed['data']} for {slices} slices: only data may span slices, so it must be "
            f"a multiple of {slices}"
        )
    # Auto: the compiler inserts collectives as the model's sharding constraints require.
    types = (AxisType.Auto,) * len(AXES)
    shape = tuple(parsed.values())
    if slices > 1:
        inside = (parsed["data"] // slices, *shape[1:])
        placed = _place(create_hybrid_device_mesh, inside, (slices, 1, 1, 1), devices[:count])
    else:
        placed = _place(create_device_mesh, shape, devices[:count])
    return Mesh(placed, AXES, axis_types=types)


def _place(create: Callable[..., Any], *arguments: Any) -> Any:
    """Puts the devices of a slice in the order of a mesh. Where possible, an axis takes whole sides of the slice."""
    try:
        return create(*arguments)
    except NotImplementedError:
        # No product of sides has this size, for example fsdp=64 on 8x16x16 chips. So axes share a side.
        return create(*arguments, allow_split_physical_axes=True)


def parse(sizes: str | Mapping[str, int]) -> dict[str, int]:
    """The sizes of the axes that a mesh names, as `make_mesh` takes them; -1 stays. Uses no device.

    Raises:
        Emu3Error: an axis is unknown or named twice, a size is not legal, or several are -1.
    """
    if not isinstance(sizes, str | Mapping):
        raise Emu3Error(f"mesh {shown(sizes)} is neither text nor a mapping: {_LEGAL}; for example data=2,tensor=4")
    if isinstance(sizes, str):
        pairs = [part.partition("=")[::2] for part in sizes.split(",") if part.strip()]
    else:
        pairs = sizes.items()
    parsed: dict[str, int] = {}
    for axis, size in pairs:
        axis = str(axis).strip()
        try:
            number = int(str(size))
        except ValueError:
            number = 0
        if axis not in AXES or axis in parsed or not (number >= 1 or number == -1):
            pair = f"{axis:.40}={size!s:.20}"
            raise Emu3Error(f"mesh {shown(sizes)}: {pair} is not legal: {_LEGAL}; for example data=2,tensor=4")
        parsed[axis] = number
    if list(parsed.values()).count(-1) > 1:
        raise Emu3Error(f"mesh {shown(sizes)} has more than one -1: {_LEGAL}")
    return parsed
