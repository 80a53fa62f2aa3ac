"""How much of the devices' memory the caches of a server may take."""

import jax

from emu3_jax.generation.language import Language

SHARE = 0.6  # of the free memory. The rest is for activations, logits and pixels


def cache_budget(language: Language) -> int | None:
    """Bytes for the caches of all rows, from the memory that is free after the model was loaded.

    Returns:
        The bytes of all devices of the model together, or None where the backend does not tell, as on CPUs.
    """
    devices = jax.local_devices()[:1] if language.mesh is None else list(language.mesh.local_devices)
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats or "bytes_in_use" not in stats:
            return None
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return int(SHARE * min(free)) * len(free)
