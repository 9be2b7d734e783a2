"""S3 backend of a store, through s3fs."""

import errno
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from infra.environment import named
from infra.errors import TransientError
from infra.settings import Settings
from infra.store.errors import StoreFullError
from infra.store.retry import retry
from infra.store.s3_environment import ENDPOINTS, blamed, check_environment, proxy_of
from infra.store.types import FileInfo, UnfinishedWrite

if TYPE_CHECKING:
    from s3fs import S3FileSystem

log = logging.getLogger(__name__)

T = TypeVar("T")

OPTIONS = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 30,  # seconds
    "retries": {"mode": "standard", "max_attempts": 3},  # parts of a large object; whole calls are retried below
}
FIRST_CONTACT_SECONDS = 3.0  # for an endpoint that has not responded yet: its address may be mistyped
READ_AHEAD = 1 << 20  # bytes
PART = 50 << 20  # bytes; an object of two or more is uploaded in parts
WRITER = "writer"  # metadata key of created objects: identifies the call that created them
CONFLICTS = 8  # attempts at a create while the server reports conflicting concurrent writes
DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "HTTPClientError", "SSLError"}
UNREACHABLE |= {"ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError", "ProxyConnectionError"}
UNREACHABLE |= {"ClientPayloadError", "ClientOSError", "ResponseParserError"}  # a truncated response
PASSING = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "IncompleteBody", "BadDigest"}
PASSING |= {
    "XAmzContentSHA256Mismatch",
    "NoSuchUpload",
}  # damaged in transit; a completed upload whose response was lost
NEVER = (501, 505)  # not implemented: retrying does not help
FULL = ("InsufficientStorage", "XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded")

_connecting = threading.Lock()
_responsive: set[str] = set()  # endpoints that have responded to this process


class Bucket:
    """The objects of a bucket; endpoint and credentials stay in the environment.

    If an endpoint that has responded before, to this process or to the one that sent this object, is down or
    overloaded, every call retries for `SFTOK_S3_PATIENCE` seconds.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.retry_seconds = Settings().s3_retry_seconds
        self._was_responsive = False
        self._client: S3FileSystem | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_was_responsive": self._is_responsive(), "_client": None}

    def reach(self) -> None:
        """Check that the bucket exists: some servers create a mistyped one at the first write."""
        try:
            self._request("head_bucket", "")
        except FileNotFoundError as error:
            raise ValueError(f"{self._uri('')}: {self._no_bucket()}") from error
        except ValueError:  # credentials may allow writes but not this request
            log.debug("%s: head_bucket was refused", self._uri(""))

    def size(self, key: str) -> int:
        """Return an object's size in bytes."""
        return int(self._call("head_object", key)["ContentLength"])

    def read(self, key: str) -> bytes:
        """Read a whole object."""
        return cast(bytes, self._run(key, lambda s3: s3.cat_file(self._path(key))))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end` of an object, the end excluded; fewer if it ends before."""
        if end <= start:
            return b""  # S3 has no empty ranges
        return cast(bytes, self._run(key, lambda s3: s3.cat_file(self._path(key), start=start, end=end)))

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Replace an object; a large one is uploaded in parts and appears when complete."""
        body = bytes(data) if len(data) < 2 * PART else _Parts(memoryview(data))
        self._run(key, lambda s3: s3.pipe_file(self._path(key), body, chunksize=PART))

    def create(self, key: str, data: bytes) -> bool:
        """Create an object by a conditional put.

        If the response is lost after the server has created it, the retry finds the object there: the mark in its
        metadata distinguishes our own from another writer's, even one of the same bytes.
        """
        mark = {WRITER: uuid.uuid4().hex}
        for attempt in range(CONFLICTS):
            try:
                self._run(key, lambda s3: s3.pipe_file(self._path(key), data, mode="create", Metadata=mark))
            except FileExistsError:
                return self._metadata(key).get(WRITER) == mark[WRITER]
            except BlockingIOError:
                time.sleep(0.05 * 2**attempt)
            else:
                return True
        raise TransientError(f"{self._uri(key)}: the server could not order this write among others")

    def put_file(self, key: str, path: Path) -> None:
        """Copy a local file into the store."""
        self._run(key, lambda s3: s3.put_file(str(path), self._path(key)))

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a local path."""
        self._run(key, lambda s3: s3.get_file(self._path(key), str(path)))

    def scan(self, folder: str) -> Iterator[FileInfo]:
        """List what is directly in a folder."""
        return self._listed(folder, Delimiter="/")

    def walk(self, prefix: str) -> Iterator[FileInfo]:
        """List objects whose keys start with `prefix`, at any depth; markers of folders, which others make, too."""
        return self._listed(prefix)

    def _listed(self, prefix: str, **options: str) -> Iterator[FileInfo]:
        for page in self._pages(prefix, **options):
            yield from (FileInfo(entry["Prefix"]) for entry in page.get("CommonPrefixes", ()))
            for entry in page.get("Contents", ()):
                key, modified = entry["Key"], entry["LastModified"].timestamp()
                if key != prefix or not key.endswith("/"):  # else the marker of this very folder
                    yield FileInfo(key, int(entry["Size"]), modified, entry["ETag"].strip('"'))

    def unfinished_writes(self, prefix: str) -> Iterator[UnfinishedWrite]:
        """List multipart uploads that were not completed."""
        more: dict[str, str] = {}
        while True:
            page = self._request("list_multipart_uploads", prefix, Prefix=prefix, **more)
            for entry in page.get("Uploads", ()):
                yield UnfinishedWrite(entry["Key"], entry["Initiated"].timestamp(), entry["UploadId"])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, unfinished: UnfinishedWrite) -> None:
        """Abort an upload, which removes its parts."""
        key, upload = unfinished.key, unfinished.upload
        self._request("abort_multipart_upload", key, Key=key, UploadId=upload)

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        self._call("delete_object", key)

    def delete_tree(self, prefix: str) -> None:
        """Remove all objects below a prefix, those directly in it first: markers must go before what they mark."""
        found = (info.key for info in self.walk(prefix) if not info.is_folder)
        keys = sorted(found, key=lambda key: (key.count("/"), not key.endswith(".json"), key))
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            self._request("delete_objects", prefix, Delete={"Objects": objects})

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading."""
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, key, self.size(key)), READ_AHEAD))

    def explain(self, error: OSError) -> str:
        """Describe an error's cause and remedy in one line."""
        return str(error).partition(": ")[2] or str(error)

    def _metadata(self, key: str) -> dict[str, str]:
        """Return an object's metadata; empty if the object is gone."""
        try:
            return cast(dict[str, str], self._call("head_object", key).get("Metadata", {}))
        except FileNotFoundError:
            return {}

    def _no_bucket(self) -> str:
        return f"there is no bucket {self.bucket!r} at {self._endpoint()}; create it or correct the URI"

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{key}"

    def _uri(self, key: str) -> str:
        return f"s3://{self._path(key)}".rstrip("/")

    def _call(self, method: str, key: str) -> dict[str, Any]:
        return self._request(method, key, Key=key)

    def _request(self, method: str, key: str, **parameters: Any) -> dict[str, Any]:
        return self._run(key, lambda s3: cast(dict[str, Any], s3.call_s3(method, Bucket=self.bucket, **parameters)))

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self._request("list_objects_v2", prefix, Prefix=prefix, **options, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _run(self, key: str, call: Callable[["S3FileSystem"], T]) -> T:
        """Make an idempotent call, retried while the server is unavailable."""
        return retry(lambda: self._attempt(key, call), self._timeout, self._remedy)

    def _attempt(self, key: str, call: Callable[["S3FileSystem"], T]) -> T:
        """Make a call once; a failure becomes a built-in error that names the object and contains no secrets."""
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        if self._client is None:
            check_environment(self._uri(key))
        try:
            result = call(self._connected())
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError, ValueError) as error:
            translated = self._translated(error, key)
            if isinstance(translated, FileNotFoundError | FileExistsError):
                _responsive.add(self._endpoint())
            raise translated from error
        _responsive.add(self._endpoint())
        return result

    def _is_responsive(self) -> bool:
        return self._was_responsive or self._endpoint() in _responsive

    def _timeout(self) -> float:
        return self.retry_seconds if self._is_responsive() else min(FIRST_CONTACT_SECONDS, self.retry_seconds)

    def _remedy(self) -> str:
        if not self._is_responsive():
            is_named = any(map(os.environ.get, ENDPOINTS))
            away = "start the server or correct" if is_named else "check the network and AWS_DEFAULT_REGION, or set"
            return f"{away} AWS_ENDPOINT_URL"
        return f"check the server and its disk, or retry for longer than SFTOK_S3_PATIENCE = {self.retry_seconds:g} s"

    def _connected(self) -> "S3FileSystem":
        """Return the client, created at the first call; its listing cache is off, since others write here too."""
        with _connecting:
            if self._client is None:
                from s3fs import S3FileSystem

                self._client = S3FileSystem(
                    anon=False, use_listings_cache=False, skip_instance_cache=True, config_kwargs=dict(OPTIONS)
                )
                self._client.retries = 1  # more would multiply with our own retries
        return self._client

    def _endpoint(self) -> str:
        """Return the server's address without credentials."""
        client = self._client.s3 if self._client is not None and self._client._s3 is not None else None
        scheme, _, rest = str(client.meta.endpoint_url if client else "the S3 server").rpartition("://")
        host = rest.rpartition("@")[2]
        return f"{scheme}://{host}" if scheme else host

    def _translated(self, error: Exception, key: str) -> Exception:
        """Translate an error into one that a caller can act on; its message begins with the URI."""
        uri, name, cause = self._uri(key), type(error).__name__, error.__cause__ or error
        response = getattr(cause, "response", None)
        if response is not None:
            return _of_response(response, uri, self)
        if name in NO_CREDENTIALS:
            return ValueError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
        if isinstance(error, TimeoutError | ConnectionError) or name in UNREACHABLE:
            proxy = proxy_of(self._endpoint())
            through = f" through the proxy {named(proxy)}" if proxy else ""
            return TransientError(f"{uri}: {self._endpoint()} does not answer{through} ({name})")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, "no such file", uri)
        if isinstance(error, OSError):
            return error
        return ValueError(f"{uri}: {blamed(error)}")


def _of_response(response: dict[str, Any], uri: str, bucket: Bucket) -> Exception:
    """Translate a server's error response."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return ValueError(f"{uri}: {bucket._no_bucket()}")
    if status == 412:
        return FileExistsError(errno.EEXIST, "exists", uri)
    if code == "ConditionalRequestConflict":
        return BlockingIOError(errno.EAGAIN, "conflict", uri)
    if status == 507 or code in FULL:
        return StoreFullError(errno.ENOSPC, f"{bucket._endpoint()} says {code or status}", uri)
    if status == 404 and code not in PASSING:
        return FileNotFoundError(errno.ENOENT, "no such file", uri)
    if code in DENIED or status in (401, 403):
        return ValueError(
            f"{uri}: {bucket._endpoint()} refused the credentials ({code}); "
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's permissions"
        )
    if (status >= 500 and status not in NEVER) or code in PASSING:
        return TransientError(f"{uri}: {bucket._endpoint()} failed ({code or status})")
    return ValueError(f"{uri}: {bucket._endpoint()} refused ({code or status}); check endpoint, region and bucket")


class _Parts:
    """A buffer whose slices are bytes, since S3's client takes no other; a whole copy would double the memory."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._data[part])


class _Ranges(io.RawIOBase):
    """A read-only file over an object, read by ranges."""

    def __init__(self, bucket: Bucket, key: str, size: int) -> None:
        self._bucket, self._key, self._size, self._at = bucket, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._bucket.read_range(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
