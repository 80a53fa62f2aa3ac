"""Paths in Cloud Storage buckets, `gs://BUCKET/PATH`. Other code calls this package and never handles `gs://` itself.

- Outputs: `files` writes them to a local temporary directory and uploads them at the end. Files that mark a result as
  complete (`copies._LAST`) are uploaded last, so a partial upload is never mistaken for a complete result.
- Bundles: `fetched` copies the small files to a local cache. Orbax and TensorStore read weights from the bucket.
- Prepared data: a `Folder` copies each shard to the cache when it is read, because ArrayRecord reads local files only.
- Runs: Orbax writes checkpoints directly to the bucket. Metrics and curves are written locally, and uploaded with each
  checkpoint.
- Locks: a bucket cannot release a lock when a process dies. So `held` renews its lock, and a lock that nobody renews
  counts as abandoned.

`foreign.local_path` refuses `gs://` paths everywhere else, and all other schemes.

gcsfs sends the requests, and `etils.epath`, which Orbax uses, also finds it. Without the extra `gcs`, gcsfs is missing
and paths in buckets are refused with a one-line error.
"""

from emu3_jax.storage.copies import Folder, delete, download, fetched, of_original, upload
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
    "Folder",
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
