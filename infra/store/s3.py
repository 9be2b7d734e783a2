"""Keep files under an S3 prefix, through s3fs; used by `infra.store.store`, and for reading sources of images."""

import errno
import io
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from infra.errors import TransientError
from infra.settings import Settings
from infra.store.errors import StoreFullError
from infra.store.retry import patiently
from infra.store.types import Abandoned, Stored

if TYPE_CHECKING:
    from s3fs import S3FileSystem

log = logging.getLogger(__name__)

T = TypeVar("T")

OPTIONS = {
    "connect_timeout": 5,  # seconds
    "read_timeout": 30,  # seconds
    "retries": {"mode": "standard", "max_attempts": 3},  # parts of a large object; whole calls are repeated below
}
FIRST_PATIENCE = 3.0  # seconds for a server that has not answered yet: its address may be mistyped
READ_AHEAD = 1 << 20  # bytes
WRITER = "writer"  # metadata of what was created: which call made it
CONFLICTS = 8  # attempts of a create that the server could not order among others'
DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "HTTPClientError", "SSLError"}
UNREACHABLE |= {"ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError"}
UNREACHABLE |= {"ClientPayloadError", "ClientOSError", "ResponseParserError"}  # an answer that was cut off
PASSING = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "IncompleteBody", "BadDigest"}
PASSING |= {"XAmzContentSHA256Mismatch", "NoSuchUpload"}  # damaged on the way; an upload that ended, its answer lost
NEVER = (501, 505)  # what a server does not know it will not learn
FULL = ("InsufficientStorage", "XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded")

_connecting = threading.Lock()
_answered: set[str] = set()  # endpoints that have answered this process


class Bucket:
    """Files below `prefix` of a bucket; endpoint and credentials stay in the environment.

    A server that has answered before, here or where this object was sent from, is waited for when it is away or
    overloaded: for `SFTOK_S3_PATIENCE` seconds, in every call.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.patience = Settings().s3_patience
        self._is_known = False
        self._client: S3FileSystem | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_is_known": self._has_answered(), "_client": None}

    def reach(self) -> None:
        """Ask for the bucket itself: some servers make a mistyped one at the first write."""
        try:
            self._request("head_bucket", "")
        except FileNotFoundError as error:
            raise ValueError(f"{self._uri('')}: {self._no_bucket()}") from error
        except ValueError:  # one may be allowed to write, and not to ask
            log.debug("%s: asking for the bucket is refused", self._uri(""))

    def size(self, key: str) -> int:
        """Bytes in an object."""
        return int(self._call("head_object", key)["ContentLength"])

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return cast(bytes, self._run(key, lambda s3: s3.cat_file(self._path(key))))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, the end excluded."""
        return cast(bytes, self._run(key, lambda s3: s3.cat_file(self._path(key), start=start, end=end)))

    def write(self, key: str, data: bytes) -> None:
        """Replace an object; large ones go in parts and appear when complete."""
        self._run(key, lambda s3: s3.pipe_file(self._path(key), data))

    def create(self, key: str, data: bytes) -> bool:
        """Make an object by a conditional put.

        An answer can be lost after the server has done it, and asking again then finds the object there: the mark in
        its metadata tells our own from another writer's, even one of the same bytes.
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
        """Copy a file in."""
        self._run(key, lambda s3: s3.put_file(str(path), self._path(key)))

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object out."""
        self._run(key, lambda s3: s3.get_file(self._path(key), str(path)))

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix`; directory markers are not ours and are skipped."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix):
            names = (entry["Key"][skip:] for entry in page.get("Contents", ()))
            yield from (name for name in names if name and not name.endswith("/"))

    def stored(self, prefix: str) -> Iterator[Stored]:
        """Objects that start with `prefix`."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/") and entry["Key"][skip:]:
                    yield Stored(entry["Key"][skip:], int(entry["Size"]), entry["LastModified"].timestamp())

    def abandoned(self, prefix: str) -> Iterator[Abandoned]:
        """Uploads in parts that were not completed."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        more: dict[str, str] = {}
        while True:
            page = self._request("list_multipart_uploads", prefix, Prefix=self._object(prefix), **more)
            for entry in page.get("Uploads", ()):
                yield Abandoned(entry["Key"][skip:], entry["Initiated"].timestamp(), entry["UploadId"])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, found: Abandoned) -> None:
        """Abort an upload; its parts are removed."""
        self._request("abort_multipart_upload", found.key, Key=self._object(found.key), UploadId=found.upload)

    def folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly below a prefix."""
        for page in self._pages(prefix, Delimiter="/"):
            yield from (entry["Prefix"].rstrip("/").rpartition("/")[2] for entry in page.get("CommonPrefixes", ()))

    def delete(self, key: str) -> None:
        """Remove an object; S3 does not mind if there is none."""
        self._call("delete_object", key)

    def delete_tree(self, prefix: str) -> None:
        """Remove all objects below a prefix; those directly in it first, so that markers go before what they mark."""
        keys = sorted(self.keys(prefix), key=lambda key: (key.count("/"), not key.endswith(".json"), key))
        for start in range(0, len(keys), 1000):
            objects = [{"Key": self._object(key)} for key in keys[start : start + 1000]]
            self._request("delete_objects", prefix, Delete={"Objects": objects})

    def open(self, key: str) -> BinaryIO:
        """An object for reading."""
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, key, self.size(key)), READ_AHEAD))

    def explain(self, error: OSError) -> str:
        """Cause and remedy in one line."""
        return str(error).partition(": ")[2] or str(error)

    def _metadata(self, key: str) -> dict[str, str]:
        """What the object's writer said of it; nothing where there is none any more."""
        try:
            return cast(dict[str, str], self._call("head_object", key).get("Metadata", {}))
        except FileNotFoundError:
            return {}

    def _no_bucket(self) -> str:
        return f"there is no bucket {self.bucket!r} at {self._endpoint()}; create it or correct the store's URI"

    def _object(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{self._object(key)}"

    def _uri(self, key: str) -> str:
        return f"s3://{self._path(key)}".rstrip("/")

    def _call(self, method: str, key: str) -> dict[str, Any]:
        return self._request(method, key, Key=self._object(key))

    def _request(self, method: str, key: str, **parameters: Any) -> dict[str, Any]:
        return self._run(key, lambda s3: cast(dict[str, Any], s3.call_s3(method, Bucket=self.bucket, **parameters)))

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self._request("list_objects_v2", prefix, Prefix=self._object(prefix), **options, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _run(self, key: str, call: Callable[["S3FileSystem"], T]) -> T:
        """Make a call, again and again while the server is away; it must be one that can be repeated."""
        return patiently(lambda: self._attempt(key, call), self._patience, self._remedy)

    def _attempt(self, key: str, call: Callable[["S3FileSystem"], T]) -> T:
        """Make a call once; every failure becomes an error of Python's that names the object and holds no secret."""
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            result = call(self._connected())
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError, ValueError) as error:
            translated = self._translated(error, key)
            if isinstance(translated, FileNotFoundError | FileExistsError):
                _answered.add(self._endpoint())
            raise translated from error
        _answered.add(self._endpoint())
        return result

    def _has_answered(self) -> bool:
        return self._is_known or self._endpoint() in _answered

    def _patience(self) -> float:
        return self.patience if self._has_answered() else min(FIRST_PATIENCE, self.patience)

    def _remedy(self) -> str:
        if not self._has_answered():
            return "start the server or correct AWS_ENDPOINT_URL"
        seconds = f"SFTOK_S3_PATIENCE = {self.patience:g}"
        return f"see to the server and its disk; how many seconds it is waited for is {seconds}"

    def _connected(self) -> "S3FileSystem":
        """The client, made at the first call; the listing cache is off, others write here too."""
        with _connecting:
            if self._client is None:
                from s3fs import S3FileSystem

                self._client = S3FileSystem(
                    anon=False, use_listings_cache=False, skip_instance_cache=True, config_kwargs=dict(OPTIONS)
                )
                self._client.retries = 1  # more would multiply with ours
        return self._client

    def _endpoint(self) -> str:
        """The server's address without credentials."""
        client = self._client.s3 if self._client is not None and self._client._s3 is not None else None
        scheme, _, rest = str(client.meta.endpoint_url if client else "the S3 server").rpartition("://")
        host = rest.rpartition("@")[2]
        return f"{scheme}://{host}" if scheme else host

    def _translated(self, error: Exception, key: str) -> Exception:
        """The error that a caller can act on; its text begins with the URI."""
        uri, name, cause = self._uri(key), type(error).__name__, error.__cause__ or error
        response = getattr(cause, "response", None)
        if response is not None:
            return _of_response(response, uri, self)
        if name in NO_CREDENTIALS:
            return ValueError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
        if isinstance(error, TimeoutError | ConnectionError) or name in UNREACHABLE:
            return TransientError(f"{uri}: {self._endpoint()} does not answer ({name})")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, "no such file", uri)
        if isinstance(error, OSError):
            return error
        return ValueError(f"{uri}: {type(error).__name__}; check the AWS settings")


def _of_response(response: dict[str, Any], uri: str, bucket: Bucket) -> Exception:
    """What a server's refusal means."""
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


class _Ranges(io.RawIOBase):
    """An object read by ranges."""

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
