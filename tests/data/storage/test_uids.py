import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_qwen2vl.data.storage.uids import (
    UID_DTYPE,
    contains_uids,
    find_uids,
    format_uid,
    parse_uid,
    parse_uids,
    read_uids,
    write_uids,
)

HALF = st.integers(0, 2**64 - 1) | st.integers(0, 3)  # few upper halves, so that lower ones have to decide
PAIRS = st.lists(st.tuples(HALF, HALF), max_size=40)


def uids_of(pairs):
    return np.array(pairs, UID_DTYPE)


@given(high=HALF, low=HALF)
def test_text_and_numbers_of_a_uid(high, low):
    text = format_uid(high, low)
    assert parse_uid(text) == parse_uid(text.upper()) == (high, low)
    assert [column.tolist() for column in parse_uids([text, text])] == [[high] * 2, [low] * 2]


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "g" * 32, "0" * 30 + "0x", " " + "0" * 31, None, 7])
def test_what_is_no_uid(text):
    with pytest.raises(ValueError, match="32 hex digits"):
        parse_uid(text)


@given(pairs=PAIRS, others=PAIRS)
def test_uids_are_found_where_they_are(pairs, others):
    listed = uids_of(sorted(set(pairs)))
    asked = uids_of(others + pairs)
    places = find_uids(listed, asked["f0"], asked["f1"])
    expected = [sorted(set(pairs)).index(uid) if uid in set(pairs) else -1 for uid in others + pairs]
    assert places.tolist() == expected
    assert contains_uids(listed, asked["f0"], asked["f1"]).tolist() == [place >= 0 for place in expected]


def test_files_are_numpys(tmp_path):
    pairs = [(5, 1), (0, 9), (5, 0), (0, 9), (2**64 - 1, 3)]
    write_uids(tmp_path / "a.npy", uids_of(pairs))
    saved = io.BytesIO()
    np.save(saved, uids_of(sorted(set(pairs))))
    assert (tmp_path / "a.npy").read_bytes() == saved.getvalue()
    read = read_uids(tmp_path / "a.npy")
    assert isinstance(read, np.memmap) and read.tolist() == sorted(set(pairs))
    write_uids(tmp_path / "b.npy", read)
    assert (tmp_path / "b.npy").read_bytes() == saved.getvalue()
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.npy"]
    write_uids(tmp_path / "none.npy", uids_of([]))
    assert len(read_uids(tmp_path / "none.npy")) == 0


def test_unsorted_files_are_sorted_with_a_warning(tmp_path, caplog):
    np.save(tmp_path / "dfn.npy", uids_of([(3, 3), (1, 2), (3, 3), (1, 1)]))
    assert read_uids(tmp_path / "dfn.npy").tolist() == [(1, 1), (1, 2), (3, 3)]
    assert "dfn.npy: not sorted, or with uids twice: 3 of 4 uids stay" in caplog.text


def test_order_is_checked_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("open_qwen2vl.data.storage.uids._CHECKED_AT_ONCE", 2)
    for disorder in range(4):
        pairs = [(0, number) for number in range(5)]
        pairs[disorder], pairs[disorder + 1] = pairs[disorder + 1], pairs[disorder]
        np.save(tmp_path / "a.npy", uids_of(pairs))
        assert read_uids(tmp_path / "a.npy").tolist() == sorted(pairs)


def test_other_files_are_one_clear_error(tmp_path):
    contents = {
        "floats.npy": np.zeros(3),
        "matrix.npy": np.zeros((2, 2), UID_DTYPE),
        "big.npy": np.zeros(3, ">u8,>u8"),
        "objects.npy": np.array([{}], object),
    }
    for name, array in contents.items():
        np.save(tmp_path / name, array, allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.zeros(3, UID_DTYPE))
    (tmp_path / "text.npy").write_text("0" * 32)
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "cut.npy", np.zeros(3, UID_DTYPE))
    os.truncate(tmp_path / "cut.npy", os.path.getsize(tmp_path / "cut.npy") - 1)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path.name}: .*dtype u8,u8"):
            read_uids(path)
    with pytest.raises(FileNotFoundError):
        read_uids(tmp_path / "nothing.npy")
