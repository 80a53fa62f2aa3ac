"""A stand-in for Cloud Storage on the loopback interface: what gcsfs, TensorStore and google-cloud-storage ask of its
JSON API.

Objects, listings with prefix and delimiter, ranges, preconditions; uploads in one request (`media`, `multipart`) and in
several (`resumable`). `refuse` lets requests fail. Buckets are made by `Store.bucket`; a bucket that is not public
answers 401 without a token, as Cloud Storage does.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator

PAGE = 3  # objects of a page of a listing, so that every listing takes several


class Stored:
    """An object."""

    def __init__(self, data: bytes, generation: int):
        self.data, self.generation, self.metageneration, self.metadata = data, generation, 1, {}


class Store:
    """What the server holds, and what was asked of it.

    Attributes:
        url: of the server.
        requests: (method, bucket, object) of all requests so far.
        refuse: is asked before each of these, and gives an HTTP status to refuse it with, or None.
    """

    def __init__(self) -> None:
        self.url = ""
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []
        self.refuse: Callable[[str, str, str], int | None] = lambda method, bucket, name: None
        self.sessions: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.generations = itertools.count(1000)
        self.lock = threading.RLock()

    def bucket(self, name: str, private: bool = False) -> dict[str, Stored]:
        """An empty bucket of that name."""
        self.buckets[name] = {}
        (self.private.add if private else self.private.discard)(name)
        return self.buckets[name]

    def put(self, bucket: str, name: str, data: bytes) -> Stored:
        self.buckets[bucket][name] = Stored(bytes(data), next(self.generations))
        return self.buckets[bucket][name]

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The objects below a prefix, by their names after it."""
        return sorted(name.removeprefix(prefix) for name in self.buckets[bucket] if name.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        return self.buckets[bucket][name].data


class Refused(Exception):
    def __init__(self, status: int, message: str = "refused"):
        self.status, self.message = status, message


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *arguments) -> None:
        pass

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self._read_body()
        try:
            with self.store.lock:
                self._route([urllib.parse.unquote(part) for part in url.path.strip("/").split("/")])
        except Refused as refused:
            self._answer(refused.status, {"error": {"code": refused.status, "message": refused.message}})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: list[str]) -> None:
        upload = path[0] == "upload"
        path = path[1:] if path[0] in ("upload", "download") else path
        if path[:3] != ["storage", "v1", "b"] or len(path) < 4:
            raise Refused(400, f"no such method: {path}")
        bucket, name = path[3], "/".join(path[5:])
        if upload:
            name = self._name_of_upload()
        self.store.requests.append((self.command, bucket, name))
        if (status := self.store.refuse(self.command, bucket, name)) is not None:
            raise Refused(status)
        if bucket not in self.store.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        if bucket in self.store.private and "Authorization" not in self.headers:
            raise Refused(401, "Anonymous caller does not have storage.objects.get access to the bucket.")
        objects = self.store.buckets[bucket]
        if upload:
            self._upload(bucket, name)
        elif len(path) == 4:
            self._answer(200, {"kind": "storage#bucket", "id": bucket, "name": bucket})
        elif not name:
            self._list(objects)
        elif self.command == "GET":
            self._get(bucket, name, objects)
        elif self.command == "PATCH":
            found = self._there(name, objects)
            found.metadata |= json.loads(self.body).get("metadata", {})
            found.metageneration += 1
            self._answer(200, self._about(bucket, name, found))
        elif self.command == "DELETE":
            self._there(name, objects)
            del objects[name]
            self._answer(204)
        else:
            raise Refused(400, f"no such method: {self.command} {path}")

    def _name_of_upload(self) -> str:
        if "upload_id" in self.query:
            session = self.store.sessions.get(self.query["upload_id"])
            return session[1] if session else ""
        if "name" in self.query:
            return self.query["name"]
        about = self._parts()[0] if self.query["uploadType"] == "multipart" else self.body
        return json.loads(about)["name"]

    def _parts(self) -> tuple[bytes, bytes]:
        """What an upload in one request says of the object, and the object."""
        mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        line = b"\r\n" if self.body.startswith(b"--" + mark + b"\r\n") else b"\n"  # data may end with half of one
        _, about, content, _ = self.body.split(b"--" + mark)
        about, content = (part.split(2 * line, 1)[1].removesuffix(line) for part in (about, content))
        return about, content

    def _there(self, name: str, objects: dict[str, Stored]) -> Stored:
        """The object of a request, whose preconditions hold."""
        if name not in objects:
            raise Refused(404, f"No such object: {name}")
        self._check(objects[name])
        return objects[name]

    def _check(self, found: Stored | None) -> None:
        generation = found.generation if found else 0
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            raise Refused(412, "conditionNotMet")
        if "generation" in self.query and int(self.query["generation"]) != generation:
            raise Refused(404, "no such generation")

    def _get(self, bucket: str, name: str, objects: dict[str, Stored]) -> None:
        found = self._there(name, objects)
        if int(self.query.get("ifGenerationNotMatch", -1)) == found.generation:
            self._answer(304)
        elif self.query.get("alt") != "media":
            self._answer(200, self._about(bucket, name, found))
        else:
            self._answer_data(found)

    def _answer_data(self, found: Stored) -> None:
        data, status = found.data, 200
        headers = {"x-goog-generation": str(found.generation), "ETag": f'"{found.generation}"'}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and found.data:
            size = len(found.data)
            first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            if first >= size:
                raise Refused(416)
            data, status = found.data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(status, data=data, headers=headers)

    def _list(self, objects: dict[str, Stored]) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        entries: dict[str, Stored | None] = {}
        for name, found in sorted(objects.items()):
            if not name.startswith(prefix) or name < self.query.get("startOffset", ""):
                continue
            if "endOffset" in self.query and name >= self.query["endOffset"]:
                continue
            inner = name.removeprefix(prefix)
            if delimiter and delimiter in inner:
                entries[prefix + inner.split(delimiter)[0] + delimiter] = None
            else:
                entries[name] = found
        after = self.query.get("pageToken", "")
        names = [name for name in entries if name > after]
        page = names[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        answer: dict = {"kind": "storage#objects"}
        found_items = [self._about("", name, item) for name in page if (item := entries[name])]
        prefixes = [name for name in page if entries[name] is None]
        answer |= {"items": found_items} if found_items else {}
        answer |= {"prefixes": prefixes} if prefixes else {}
        if len(names) > len(page):
            answer["nextPageToken"] = page[-1]
        self._answer(200, answer)

    def _upload(self, bucket: str, name: str) -> None:
        objects = self.store.buckets[bucket]
        session = self.query.get("upload_id")
        if session:
            self._continue(session)
            return
        if self.query["uploadType"] == "resumable":
            self._check(objects.get(name))
            session = str(next(self.store.generations))
            self.store.sessions[session] = (bucket, name, dict(self.query), bytearray())
            place = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
            self._answer(200, headers={"Location": place})
            return
        self._check(objects.get(name))
        data = self._parts()[1] if self.query["uploadType"] == "multipart" else self.body
        self._answer(200, self._about(bucket, name, self.store.put(bucket, name, data)))

    def _continue(self, session: str) -> None:
        """A further piece of a resumable upload."""
        if session not in self.store.sessions:
            raise Refused(404)
        if self.command == "DELETE":
            del self.store.sessions[session]
            self._answer(499)
            return
        bucket, name, query, data = self.store.sessions[session]
        data += self.body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total and total != "*" and len(data) < int(total):
            self._answer(308, headers={"Range": f"bytes=0-{len(data) - 1}"})
            return
        del self.store.sessions[session]
        self.query = query
        self._check(self.store.buckets[bucket].get(name))
        self._answer(200, self._about(bucket, name, self.store.put(bucket, name, data)))

    def _about(self, bucket: str, name: str, found: Stored) -> dict:
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(found.data)),
            "generation": str(found.generation),
            "metageneration": str(found.metageneration),
            "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "metadata": found.metadata,
        }

    def _answer(self, status: int, about: dict | None = None, data: bytes = b"", headers: dict | None = None) -> None:
        if about is not None:
            data, headers = json.dumps(about).encode(), {"Content-Type": "application/json"}
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address) -> None:
        pass  # a client that is killed closes its connections


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """A server on a free port of the loopback interface."""
    store = Store()
    handler = type("_Handler", (Handler,), {"store": store})
    with Server(("127.0.0.1", 0), handler) as server:
        store.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
