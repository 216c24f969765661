"""Where files are looked for, how archives are read, what is fetched."""

import hashlib
import http.server
import tarfile
import threading

import numpy as np
import pytest

from optalr.experiments.data.sources import Download, Search, cache_folder, find
from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import (
    cifar10_files,
    damage,
    idx_bytes,
    load_files,
    write_mnist,
    write_tar,
)


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    with pytest.raises(ExperimentError, match=r"files not found .*data\.folder or \$OPTALR_DATA"):
        load_files("mnist", "")
    write_mnist(cache_folder("mnist"))
    assert len(load_files("mnist", "").train) == 40
    write_mnist(tmp_path / "base" / "mnist")
    (tmp_path / "base" / "mnist" / "train-labels-idx1-ubyte").write_bytes(
        idx_bytes(np.zeros(40, np.uint8))
    )
    monkeypatch.setenv("OPTALR_DATA", str(tmp_path / "base"))
    assert load_files("mnist", "").train.y.max() == 0
    with pytest.raises(ExperimentError, match="does not exist"):
        load_files("mnist", tmp_path / "nowhere")


def test_an_archive_itself_can_be_named(tmp_path):
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", cifar10_files(False))
    assert len(load_files("cifar10", path).train) == 20


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "cifar-10-batches-py/../../x"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    files = {name: b"x", **cifar10_files(False)}
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(ExperimentError, match="leads out of its folder: refused"):
        load_files("cifar10", tmp_path)


def test_an_archive_with_a_link_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ExperimentError, match="refused"):
        load_files("cifar10", tmp_path)


@pytest.mark.parametrize("change", [lambda b: b[: len(b) // 2], lambda b: b"<html>" + b])
def test_a_damaged_archive_is_refused(tmp_path, change):
    write_tar(tmp_path / "cifar-10-python.tar.gz", cifar10_files(False))
    damage(tmp_path, "cifar-10-python.tar.gz", change)
    with pytest.raises(ExperimentError, match="cut short or no tar archive"):
        load_files("cifar10", tmp_path)


@pytest.fixture
def server(tmp_path):
    """Serve a folder on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_download_is_checked_against_its_checksum(server, caplog):
    folder, address = server
    (folder / "file").write_bytes(b"content")
    right = hashlib.md5(b"content").hexdigest()
    search = Search("some", download=True)
    wanted = {"file": ("file",)}
    with pytest.raises(ExperimentError, match="does not have the checksum"):
        find(search, wanted, downloads=[Download(f"{address}/file", "0" * 32)])
    assert not (cache_folder("some") / "file").exists()
    with pytest.raises(ExperimentError, match=r"set data\.download=true"):
        find(Search("some"), wanted, downloads=[Download(f"{address}/file", right)])
    found = find(search, wanted, downloads=[Download(f"{address}/file", right)])
    assert found == {"file": b"content"}
    assert find(Search("some"), wanted) == found
    with pytest.raises(ExperimentError, match="cannot fetch"):
        find(search, {"other": ("other",)}, downloads=[Download(f"{address}/other", right)])
