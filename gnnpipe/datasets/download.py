"""Files from the web: resumed where they broke off, checked, and there whole or not at all.

What has arrived so far lies beside the target as ``NAME.part`` with the server's tag in
``NAME.part.tag``, so that a file that has changed meanwhile is not glued to the old one.
"""

import hashlib
import http.client
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from gnnpipe.errors import UserError

TRIES = 5
TIMEOUT_S = 20.0
BLOCK_BYTES = 2**20

logger = logging.getLogger("gnnpipe")


class DownloadError(Exception):
    """The file cannot be had; the message says why."""


class _Reply(NamedTuple):
    """What a server has told of a file."""

    total: int | None
    """Bytes of the whole file."""
    is_part: bool
    """Whether it sends only what was missing."""
    tag: str


def fetch(url: str, target: Path, *, sha256: str | None = None) -> None:
    """Downloads a file, going on where an earlier try ended.

    Args:
        url: http or https.
        target: its directory is created.
        sha256: of the whole file, in hexadecimal; None trusts its length.

    Raises:
        DownloadError: no connection, no such file, or not what ``sha256`` says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, reason = target.with_name(target.name + ".part"), ""
    idle = 0  # tries in a row that brought nothing
    while idle < TRIES:
        before = _size(part)
        try:
            total = _continue(url, part)
        except urllib.error.HTTPError as error:
            raise DownloadError(f"the server says {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            total = -1
        if total is None or _size(part) == total:
            _publish(part, target, sha256)
            return
        if total >= 0:
            reason = f"it ended after {_size(part)} of {total} bytes"
        if _size(part) == before == 0:
            break  # Nothing has ever come: no connection, and nothing to go on with.
        idle = 0 if _size(part) > before else idle + 1
    raise DownloadError(reason)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip file into a directory that does not exist yet; checks every member's CRC.

    Args:
        archive: holds a single top directory.
        folder: what that directory becomes.

    Raises:
        DownloadError: the archive is damaged or has another form.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as scratch:
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(scratch)  # drops drive letters, leading slashes and ".."
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise DownloadError(f"{archive} is damaged: {error}") from error
        tops = [path for path in Path(scratch).iterdir() if path.is_dir()]
        if len(tops) != 1:
            raise DownloadError(f"{archive} holds {len(tops)} directories, not one")
        shutil.move(tops[0], folder)


def obtain(url: str, folder: Path, *, sha256: str | None = None, manual: str) -> None:
    """Downloads and unpacks an archive.

    Args:
        url: of a zip file.
        folder: what its top directory becomes.
        sha256: of the zip file.
        manual: what to do by hand where that fails.

    Raises:
        UserError: that failed.
    """
    archive = folder.parent / url.rsplit("/", 1)[-1]
    is_here = archive.exists()  # somebody has put it there
    try:
        if not is_here:
            logger.info("downloading %s into %s", url, folder)
            fetch(url, archive, sha256=sha256)
        unpack(archive, folder)
    except DownloadError as error:
        if not is_here:
            archive.unlink(missing_ok=True)
        raise UserError(f"{url} could not be downloaded ({error}); {manual}") from error
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written ({error.strerror}); {manual}"
        ) from error
    if not is_here:
        archive.unlink()


def _continue(url: str, part: Path) -> int | None:
    """Appends what is missing; returns how long the whole is, as far as the server says."""
    tag_file = part.with_name(part.name + ".tag")
    tag = tag_file.read_text() if tag_file.exists() else ""
    start = _size(part) if tag else 0
    headers = {"User-Agent": "gnnpipe"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            reply = _read_headers(response)
            tag_file.write_text(reply.tag)
            with part.open("ab" if reply.is_part else "wb") as file:
                shutil.copyfileobj(response, file, BLOCK_BYTES)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # Nothing is missing.
            return start
        raise
    return reply.total


def _read_headers(response: Any) -> _Reply:  # urllib's has no type
    headers = response.headers
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    if response.status == 206:
        total = headers.get("Content-Range", "").rsplit("/", 1)[-1]
        return _Reply(int(total) if total.isdecimal() else None, True, tag)
    length = headers.get("Content-Length", "")
    return _Reply(int(length) if length.isdecimal() else None, False, tag)


def _publish(part: Path, target: Path, sha256: str | None) -> None:
    """Gives the finished file its name."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    part.with_name(part.name + ".tag").unlink(missing_ok=True)
    if sha256 is not None and found != sha256:
        part.unlink()
        raise DownloadError(f"its SHA-256 is {found}, not {sha256}")
    logger.info("%s has the SHA-256 %s", target.name, found)
    part.replace(target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
