"""What sets of each form hold: every kind of file, each form of a picture in a table, what is left out by reason."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_qwen2vl.decontamination.index import ContaminationIndex, build_index
from open_qwen2vl.decontamination.sets import EvaluationSet, find_sets
from tests.data.conftest import encode_image, make_sample, write

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def contents(folder, against) -> dict:
    found = build_index(folder, find_sets([f"eval={against}"]))["contents"]["eval"]
    assert found.pop("examples").keys() == found["skipped"].keys()
    return found


@pytest.mark.parametrize(
    "column",
    [
        lambda data: pa.array([data, data], pa.binary()),
        lambda data: pa.array([[data], [data]], pa.list_(pa.large_binary())),
        lambda data: pa.array([{"bytes": None, "path": "pictures/a.png"}, {"bytes": data, "path": None}], IMAGE),
        lambda data: pa.array(["pictures/a.png", "pictures/a.png"]),
    ],
)
def test_each_form_of_a_picture_in_a_table_is_read(column, evaluation_pictures, tmp_path):
    data = encode_image(evaluation_pictures[0])
    (tmp_path / "eval/pictures").mkdir(parents=True)
    (tmp_path / "eval/pictures/a.png").write_bytes(data)
    pq.write_table(pa.table({"image": column(data)}), tmp_path / "eval/test.parquet")
    found = contents(tmp_path / "against", tmp_path / "eval/test.parquet")
    assert found == {"pictures": 2, "texts": 0, "skipped": {}}


def test_a_table_without_any_readable_picture_is_refused(tmp_path, evaluation_pictures):
    cells = ["gone.png", "A" * 5000, ""]
    pq.write_table(pa.table({"image": cells, "question": ["is it red?"] * 3}), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"--against eval: no picture .* image of .*test.parquet: missing_image 3 \("):
        contents(tmp_path / "against", tmp_path / "test.parquet")
    assert not (tmp_path / "against").exists()
    evaluation_pictures[0].save(tmp_path / "there.png")
    pq.write_table(pa.table({"image": [*cells, "there.png"]}), tmp_path / "test.parquet")
    found = contents(tmp_path / "against", tmp_path / "test.parquet")
    assert (found["pictures"], found["skipped"]) == (1, {"missing_image": 3})


def test_a_folder_is_read_whole_and_counts_what_is_not_read(tmp_path, evaluation_pictures):
    first, second, third, fourth = (encode_image(evaluation_pictures[n]) for n in (0, 2, 8, -1))
    (tmp_path / "eval/data").mkdir(parents=True)
    (tmp_path / "eval/a.PNG").write_bytes(first)
    (tmp_path / "eval/named.png").write_bytes(second)  # by a table as well: once
    pq.write_table(pa.table({"file_name": ["a.PNG"], "caption": ["a roof"]}), tmp_path / "eval/metadata.parquet")
    rows = {"image": [{"bytes": third, "path": None}, {"bytes": None, "path": "../named.png"}]}
    pq.write_table(
        pa.table({"image": pa.array(rows["image"], IMAGE)}), tmp_path / "eval/data/test-00000-of-00001.parquet"
    )
    write(tmp_path / "eval/data/0.tar", make_sample("x", "a cat", fourth))
    (tmp_path / "eval/labels.jsonl").write_text("{}")
    (tmp_path / "eval/.hidden").write_text("")
    (tmp_path / "eval/link").symlink_to(tmp_path / "eval/data", target_is_directory=True)
    found = contents(tmp_path / "against", tmp_path / "eval")
    assert found == {"pictures": 4, "texts": 2, "skipped": {"not_read": 1, "not_read.jsonl": 1}}
    # The kind of each file that a pattern matches is its own.
    shutil.copy(tmp_path / "eval/data/0.tar", tmp_path / "eval/b.tar")
    (tmp_path / "eval/labels.jsonl").unlink()
    (tmp_path / "eval/link").unlink()
    found = contents(tmp_path / "pattern", f"{tmp_path}/eval/*")
    assert (found["pictures"], found["skipped"]) == (5, {})
    with pytest.raises(ValueError, match="notes.txt: a set is a folder"):
        (tmp_path / "eval/notes.txt").write_text("")
        contents(tmp_path / "refused", f"{tmp_path}/eval/*")


def test_what_a_tar_loses_is_counted(tmp_path, evaluation_pictures):
    data = [
        encode_image(picture) for picture in (evaluation_pictures[0], evaluation_pictures[2], evaluation_pictures[8])
    ]
    members = [*make_sample("a", "a cat", data[0]), *make_sample("b", "a dog", data[1])]
    members += [*make_sample("a", "a cat", data[2]), ("c.v2.png", data[2]), ("d.txt", b"a sentence alone")]
    write(tmp_path / "eval.tar", members)
    found = contents(tmp_path / "against", tmp_path / "eval.tar")
    assert found["skipped"] == {"dotted_key": 1, "duplicate_key": 1, "missing_image": 1}
    assert (found["pictures"], found["texts"]) == (2, 3)


def test_a_damaged_index_names_the_file_and_what_to_delete(tmp_path, evaluation_folder):
    sets = [EvaluationSet("bench", (evaluation_folder,), None)]
    build_index(tmp_path / "whole", sets)
    folder = tmp_path / "against"
    for name in (
        "crops.faiss",
        "ngrams.npz",
        "thumbnails.npy",
        "colors.npy",
        "owners.npy",
        "names.json",
        "index.json",
    ):
        size = (tmp_path / "whole" / name).stat().st_size
        for content in (None, b"", (tmp_path / "whole" / name).read_bytes()[: size // 2], bytes(size)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", folder)
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"^{folder}/{name}: damaged or missing; delete {folder} to make it"):
                build_index(folder, sets)
                ContaminationIndex(folder)
    shutil.rmtree(folder)
    build_index(folder, sets)
    assert len(ContaminationIndex(folder).similarities(Image.open(evaluation_folder / "00.png")))
