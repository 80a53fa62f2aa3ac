"""Paths in buckets, `gs://BUCKET/PATH`. This package is the one place that knows them.

Outputs: `files` writes them to a local temporary directory, as any output, and uploads them when they are whole. The
files that mark a result as complete go last (`copies._LAST`), so that nothing half-uploaded is taken for whole.
Bundles: `fetched` copies the small files to a local cache. Orbax and TensorStore read the weights from the bucket.
Prepared data: `fetched` copies them to the cache, for ArrayRecord reads local files alone.
Runs: Orbax writes checkpoints straight to the bucket. Metrics and curves are written locally, and uploaded at each
checkpoint. A bucket has no locks that end with their process, so `held` keeps one alive by renewing it.
All other uses, and all other schemes, are refused by `foreign.local_path`.

gcsfs sends the requests. `etils.epath`, which Orbax uses, finds it too. Without the extra `gcs` there is no gcsfs, and
paths in buckets are refused in one line.
"""

from emu3_jax.storage.copies import delete, download, fetched, of_original, upload
from emu3_jax.storage.locks import held
from emu3_jax.storage.objects import (
    exists,
    is_file,
    listing,
    matching,
    place,
    read_json,
    require_directory,
    size,
    storage_place,
    unlink,
)
from emu3_jax.storage.paths import check_place, is_remote, kvstore
from emu3_jax.storage.requests import explained, require_access

__all__ = [
    "check_place",
    "delete",
    "download",
    "exists",
    "explained",
    "fetched",
    "held",
    "is_file",
    "is_remote",
    "kvstore",
    "listing",
    "matching",
    "of_original",
    "place",
    "read_json",
    "require_access",
    "require_directory",
    "size",
    "storage_place",
    "unlink",
    "upload",
]
