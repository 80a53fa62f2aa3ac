"""`/v1/videos`: a clip is asked for, looked after, fetched and deleted. Clips are kept in memory for an hour."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import pathlib
import secrets
import time
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from emu3_jax.files import local_directory
from emu3_jax.generation import defaults
from emu3_jax.media.clips import check_fps, save_clip
from emu3_jax.printable import shown
from emu3_jax.serving.fields import Fields, check_model
from emu3_jax.serving.following import following
from emu3_jax.serving.jobs import ClipFrames, ClipJob, Failed, Finished, Jobs, Started
from emu3_jax.serving.limits import Limits
from emu3_jax.serving.pictures_api import read_ratio, read_sampling
from emu3_jax.serving.pixels import read_picture, read_upload
from emu3_jax.serving.refusals import Refused, bad, refusing

_log = logging.getLogger("emu3_jax")
_MOST_CLIPS = 32  # clips that are kept, finished or not
_KEPT = 3600  # seconds that a finished clip is kept
_MOST_FRAMES = 1024


@dataclasses.dataclass
class _Video:
    """A clip that was asked for. `data` is the file when it is done."""

    job: ClipJob
    model: str
    id: str = dataclasses.field(default_factory=lambda: f"video_{secrets.token_hex(16)}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    status: str = "queued"
    frames: int = 0
    size: str = ""
    done: int | None = None
    error: str | None = None
    data: bytes = b""
    kind: str = ""
    task: asyncio.Task[None] | None = None

    def about(self) -> dict[str, Any]:
        """The object of OpenAI's API."""
        error = None if self.error is None else {"code": "job_failed", "message": self.error}
        progress = 100 if self.status == "completed" else min(99, 100 * self.frames // self.job.frames)
        return {
            "id": self.id, "object": "video", "model": self.model, "status": self.status, "progress": progress,
            "created_at": self.created, "completed_at": self.done,
            "expires_at": None if self.done is None else self.done + _KEPT, "prompt": self.job.prompt,
            "seconds": f"{self.job.frames / self.job.fps:g}", "size": self.size or self.job.ratio or "auto",
            "error": error, "fps": self.job.fps,
            "remixed_from_video_id": None, "frames": self.job.frames, "seed": self.job.seed,
        }  # fmt: skip


def read_request(fields: Fields, limits: Limits, model: str, client: str) -> ClipJob:
    """Reads the fields of `create`, and decodes the picture.

    Raises:
        Refused: a field is wrong or unknown, or the picture cannot be read.
    """
    check_model(fields, model)
    settings, (seed,) = read_sampling(fields, 1, defaults.TEMPERATURE)
    fps = fields.number("fps", defaults.FPS)
    with refusing("fps"):
        check_fps(fps)
    seconds = fields.number("seconds", defaults.FRAMES / defaults.FPS)
    frames = fields.whole("frames", 0, 1, _MOST_FRAMES) or round(seconds * fps)
    if not 1 <= frames <= _MOST_FRAMES:
        raise bad("seconds", f"seconds is {seconds:g}: give up to {_MOST_FRAMES / fps:g} seconds")
    sized = fields.raw("ratio") is not None or fields.raw("size") not in (None, "auto")
    area = fields.whole("area", 0, 1, 1 << 22)
    job = ClipJob(
        prompt=fields.filled("prompt"),
        negative=fields.text("negative_prompt", ""),
        guidance=fields.number("guidance_scale", defaults.GUIDANCE),
        ratio=read_ratio(fields) if sized else None,
        area=area or None,
        frames=frames,
        fps=fps,
        picture=_first_frame(fields, limits),
        seed=seed,
        client=client,
        **settings,
    )
    fields.ignore("user", "safety_identifier")
    fields.close()
    return job


def _first_frame(fields: Fields, limits: Limits) -> Image.Image | None:
    """The picture that the clip begins with: the file of a form, or a data URL in JSON."""
    name = "input_reference"
    given = fields.raw(name)
    if given is None:
        return None
    if isinstance(given, bytes):
        return read_upload(given, name, limits)
    return read_picture(given.get("image_url") if isinstance(given, dict) else given, name, limits)


def encode_clip(frames: np.ndarray, fps: float = defaults.FPS) -> tuple[bytes, str]:
    """Encodes frames as MP4, or as animated WebP where PyAV is missing. Returns the bytes and their media type."""
    suffix, kind = (".mp4", "video/mp4") if importlib.util.find_spec("av") else (".webp", "image/webp")
    with local_directory() as directory:
        file = pathlib.Path(directory) / f"clip{suffix}"
        save_clip(frames, file, fps)
        return file.read_bytes(), kind


class Videos:
    """The clips of a server."""

    def __init__(self, jobs: Jobs):
        self._jobs = jobs
        self._videos: dict[str, _Video] = {}

    async def create(self, job: ClipJob, model: str) -> dict[str, Any]:
        """Asks for a clip, and returns as soon as it is taken.

        Raises:
            Refused: too many clips are kept, or `Jobs` refuses the clip.
        """
        self._forget()
        if len(self._videos) >= _MOST_CLIPS:
            raise Refused(429, f"the server keeps {_MOST_CLIPS} clips: delete one, or try again later",
                          code="too_many_videos", headers={"Retry-After": "60"})  # fmt: skip
        video = _Video(job, model)
        self._videos[video.id] = video
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        video.task = asyncio.create_task(self._follow(video, taken))
        try:
            await asyncio.shield(taken)
        except BaseException:
            del self._videos[video.id]
            video.task.cancel()
            raise
        return video.about()

    async def _follow(self, video: _Video, taken: asyncio.Future[None]) -> None:
        try:
            async with following(self._jobs, [video.job]) as followed:
                video.job = dataclasses.replace(video.job, picture=None)  # it would stay in memory as long as the clip
                taken.set_result(None)
                async for _, event in followed.events():
                    if isinstance(event, Started):
                        video.status = "in_progress"
                    elif isinstance(event, ClipFrames):
                        video.frames = event.first + len(event.frames)
                    elif isinstance(event, Failed):
                        video.error = event.message
                    elif isinstance(event, Finished) and event.clip is not None:
                        video.data, video.kind = await asyncio.to_thread(encode_clip, event.clip, video.job.fps)
                        video.size = f"{event.clip.shape[2]}x{event.clip.shape[1]}"
        except Refused as refused:
            if not taken.done():
                taken.set_exception(refused)
            video.error = refused.message
        except Exception as error:
            _log.exception("a clip failed")
            video.error = "the clip could not be made: see the server's log"
            if not taken.done():
                taken.set_exception(error)
        finally:
            video.done = int(time.time())
            video.status = "completed" if video.data else "failed"
            if not video.data:
                video.error = video.error or "the job was stopped: try again"

    def _forget(self) -> None:
        now = time.time()
        for name in [v.id for v in self._videos.values() if v.done is not None and now > v.done + _KEPT]:
            del self._videos[name]

    def find(self, request: Request) -> _Video:
        """The clip that the path names. Raises `Refused` if there is none."""
        self._forget()
        name = request.path_params["id"]
        video = self._videos.get(name)
        if video is None:
            raise Refused(404, f"there is no video {shown(name)}: it was deleted, or is too old", code="not_found")
        return video

    async def list(self, request: Request) -> Response:
        """All clips, newest first."""
        self._forget()
        data = [video.about() for video in reversed(self._videos.values())]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, "has_more": False, **ends})

    async def one(self, request: Request) -> Response:
        """How far a clip is."""
        return JSONResponse(self.find(request).about())

    async def content(self, request: Request) -> Response:
        """The file of a clip."""
        video = self.find(request)
        if request.query_params.get("variant", "video") != "video":
            raise bad("variant", "variant must be video: there are no thumbnails", "unsupported_value")
        if not video.data:
            raise Refused(409, f"the video is {video.status}: wait until it is completed", code="not_ready",
                          headers={"Retry-After": "2"})  # fmt: skip
        return Response(video.data, media_type=video.kind)

    async def delete(self, request: Request) -> Response:
        """Deletes a clip, also one that is not finished."""
        video = self.find(request)
        del self._videos[video.id]
        if video.task is not None:
            video.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await video.task
        return JSONResponse({"id": video.id, "object": "video.deleted", "deleted": True})
