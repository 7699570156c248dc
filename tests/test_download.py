"""Downloads from a server on this host that breaks off, changes its mind or is not there."""

import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gnnpipe.datasets import download, load_graph, ogb
from gnnpipe.datasets.download import DownloadError, fetch
from gnnpipe.errors import UserError

CONTENT = bytes(range(256)) * 40
NO_SERVER = "http://127.0.0.1:9"  # discard: nobody listens


class Server(ThreadingHTTPServer):
    """Serves one content and notes what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.cut = CONTENT, '"one"', 0
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Honours Range and If-Range; breaks off after ``cut`` bytes if that is above 0."""

    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        content, start = self.server.content, 0
        if self.path.startswith("/none"):
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and self.headers.get("If-Range") == self.server.tag:
            start = int(match[1])
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        end = start + self.server.cut if self.server.cut else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_connection_that_breaks_off_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cut = 3000
    fetch(f"{server.url}/file", tmp_path / "file", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_later_call_goes_on_too_unless_the_file_has_changed(
    server: Server, tmp_path: Path
) -> None:
    part = tmp_path / "file.part"
    for content in (CONTENT, CONTENT[::-1]):
        server.content, server.ranges = content, []
        part.write_bytes(CONTENT[:100])
        (tmp_path / "file.part.tag").write_text('"one"')
        server.tag = '"one"' if content is CONTENT else '"two"'
        fetch(f"{server.url}/file", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content
        assert server.ranges == ["bytes=100-"]
    part.write_bytes(CONTENT[:100])  # nobody knows of what: from the start
    fetch(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT[::-1]


def test_what_arrived_whole_before_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    (tmp_path / "file.part.tag").write_text('"one"')
    fetch(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_bytes_are_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="its SHA-256 is .*, not 00"):
        fetch(f"{server.url}/file", tmp_path / "file", sha256="00")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_had_say_why(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the server says 404"):
        fetch(f"{server.url}/none", tmp_path / "file")
    with pytest.raises(DownloadError, match="refused"):
        fetch(f"{NO_SERVER}/file", tmp_path / "file")
    server.cut, server.tag = 10, ""  # nothing to go on by: it never gets further
    with pytest.raises(DownloadError, match=f"it ended after 10 of {len(CONTENT)} bytes"):
        fetch(f"{server.url}/file", tmp_path / "file")
    assert len(server.ranges) == 2 + download.TRIES


def arxiv_archive(folder: Path) -> bytes:
    from test_examples import write_data

    write_data(folder / "arxiv", "ogbn_arxiv")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for path in sorted((folder / "arxiv").rglob("*.gz")):
            file.write(path, path.relative_to(folder))
    return stream.getvalue()


def test_a_data_set_of_ogb_arrives_by_itself(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    server.content, server.cut = arxiv_archive(tmp_path / "made"), 3000
    monkeypatch.setattr(ogb, "URL", server.url)
    home = tmp_path / "home"
    home.mkdir()
    graph = load_graph("ogbn-arxiv", root=str(home))
    direct = load_graph("ogbn-arxiv", root=str(tmp_path / "made/arxiv"))
    assert graph.fingerprint() == direct.fingerprint()
    assert [path.name for path in home.iterdir()] == ["ogbn_arxiv"]
    asked = len(server.ranges)
    load_graph("ogbn-arxiv", root=str(home))
    assert len(server.ranges) == asked > 1


def test_damaged_archives_and_no_connection_end_in_manual_steps(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ogb, "URL", server.url)
    with pytest.raises(UserError, match=r"arxiv.zip is damaged: .*unpack it in .*raw/ and split"):
        load_graph("ogbn-arxiv", root=str(tmp_path))
    monkeypatch.setattr(ogb, "URL", NO_SERVER)
    with pytest.raises(UserError, match=r"arxiv.zip could not be downloaded \(.*refused\); get"):
        load_graph("ogbn-arxiv", root=str(tmp_path))
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match="has only a part; unpack http"):
        load_graph("ogbn-arxiv", root=str(tmp_path))
