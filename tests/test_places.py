"""Paths and URLs: what is remote is read, compared and written as what is here, and never holds a secret."""

import os
import pickle

import pytest

from open_qwen2vl.files import (
    content_hash,
    describe_shard,
    describe_shards,
    remove_temporaries,
    renamed_when_whole,
    shard_path,
    write_text,
)
from open_qwen2vl.output_lock import FolderInUse, only_writer
from open_qwen2vl.places import (
    arrow_source,
    files_at,
    identities,
    identity,
    is_remote,
    list_tree,
    open_file,
    open_stream,
    place,
)
from open_qwen2vl.transfers import local_copy, remove_tree


def test_paths_of_this_machine_stay_paths(tmp_path):
    for given in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        found = place(given)
        assert found == tmp_path and type(found) is type(tmp_path) and not is_remote(found)
    assert arrow_source(tmp_path) is tmp_path


@pytest.mark.parametrize(
    "url",
    [
        "https://tester:verysecret@host/a.tar",
        "s3://AKIA:verysecret@bucket/a.tar",
        "https://bucket.s3.amazonaws.com/a.tar?X-Amz-Signature=verysecret&X-Amz-Expires=60",
        "https://account.blob.core.windows.net/c/a.tar?sig=verysecret",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="a.tar: the URL holds") as error:
        place(url)
    assert "verysecret" not in str(error.value) and "verysecret" not in repr(error.value.__cause__)


def test_a_kind_without_its_library_is_one_line(memory):
    with pytest.raises(ValueError, match="nosuch://bucket/a.tar: .*nosuch"):
        place("nosuch://bucket/a.tar")


def test_an_error_of_a_store_s_library_names_the_url(monkeypatch):
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "notaurl")  # of which botocore has a ValueError of its own
    for ask in (lambda url: open_file(url).read_at(1, 0), identity, lambda url: only_writer(url).__enter__()):
        with pytest.raises(OSError, match="ValueError: Invalid endpoint: notaurl.*s3://bucket/x"):
            ask("s3://bucket/x")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(OSError, match="ParamValidationError: .*s3://Bad!/x"):
        only_writer("s3://Bad!/x").__enter__()
    fsspec.filesystem("s3").clear_instance_cache()


def check_reading(folder: str) -> None:
    """All ways to read, in any remote folder."""
    content = bytes(range(256)) * 100
    write_text(place(folder) / "a" / "b.txt", "text")
    (place(folder) / "x.tar").write_bytes(content)
    url = f"{folder}/x.tar"
    for whole in (False, True):
        with open_file(url, whole=whole) as file:
            assert file.size == len(content) and file.name == url
            for offset, size in ((0, 10), (300, 1000), (len(content) - 5, 100), (len(content), 1), (10**9, 7), (0, 0)):
                assert file.read_at(size, offset) == content[offset : offset + size]
    with open_stream(url) as stream:
        stream.seek(-3, os.SEEK_END)
        assert (stream.read(), stream.read(5), stream.tell()) == (content[-3:], b"", len(content))
    with local_copy(url) as copy:
        assert copy.read_bytes() == content
    assert not copy.exists()
    assert files_at(folder, "*.tar") == files_at(f"{folder}/*.tar", "") == files_at(url, "*.tar") == [place(url)]
    assert list_tree(folder) == [(name, identity(f"{folder}/{name}")) for name in ("a/b.txt", "x.tar")]
    assert pickle.loads(pickle.dumps(place(url))).read_bytes() == content
    with pytest.raises(FileNotFoundError, match=f"no such file.*{folder}/no.tar"):
        open_file(f"{folder}/no.tar").read_at(1, 0)
    remove_tree(place(folder) / "a")
    remove_tree(place(folder) / "a")
    assert [name for name, _ in list_tree(folder)] == ["x.tar"]


def check_identity(folder: str, other: "os.PathLike") -> None:
    """A file is told by its size and ETag, from a listing as from itself."""
    urls = [f"{folder}/{name}" for name in "abc"]
    for url in urls[:2]:
        place(url).write_bytes(b"12345")
    before = identity(urls[0])
    assert before["size"] == 5 and before["etag"] and "mtime_ns" not in before
    assert identities(urls) == [before, identity(urls[1]), None]
    assert identities([urls[2]]) == [None]
    (described,) = describe_shards([urls[0]], other)
    assert described == describe_shard(place(urls[0]), place(folder)) == {"path": urls[0], **before}
    assert shard_path(other, described) == shard_path(folder, described) == urls[0]
    place(urls[0]).write_bytes(b"54321")
    assert identity(urls[0])["size"] == 5 and identity(urls[0]) != before
    assert identities(urls)[0] == identity(urls[0])
    with pytest.raises(FileNotFoundError, match=urls[2]):
        describe_shards(urls, other)


def check_writing(folder: str) -> None:
    """What is written is there as a whole or not at all, and nothing beside it."""
    path = place(folder) / "a.json"
    with pytest.raises(RuntimeError), renamed_when_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not path.exists()
    with renamed_when_whole(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and not temporary.exists()
    assert content_hash(path) == content_hash(str(path))
    remove_temporaries([path])
    with only_writer(path.parent):
        assert [one.name for one in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", ["memory", pytest.param("bucket", marks=pytest.mark.slow)])
def test_what_is_remote_is_read_and_written_like_a_file(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    check_reading(f"{folder}/read")
    check_identity(f"{folder}/told", tmp_path)
    check_writing(f"{folder}/written")


def test_a_file_of_this_machine_is_absolute_for_a_remote_folder(tmp_path, memory):
    (tmp_path / "a.tar").write_bytes(b"1")
    described = describe_shard(tmp_path / "a.tar", place(memory))
    assert described["path"] == str(tmp_path / "a.tar") == shard_path(memory, described)


def test_two_writers_of_this_machine_are_kept_apart(memory, monkeypatch):
    import fcntl

    with only_writer(f"{memory}/out"), only_writer(f"{memory}/other"):
        pass

    def held(*_):
        raise BlockingIOError(11, "held")

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(FolderInUse, match=f"is writing {memory}/out"), only_writer(f"{memory}/out", patience=0):
        pass


def test_an_upload_that_fails_leaves_what_was_there(memory, monkeypatch):
    path = place(f"{memory}/a.txt")
    write_text(path, "old")

    def fails(*_, **__):
        raise ConnectionError("cut")

    monkeypatch.setattr(type(path.fs), "put_file", fails)
    with pytest.raises(OSError, match=f"cut.*{memory}/a.txt"):
        write_text(path, "new")
    assert path.read_text() == "old"
