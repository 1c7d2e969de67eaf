import hashlib
import io

import imagehash
import pyarrow.parquet as pq
from PIL import Image

from open_qwen2vl.data.scoring import ScoreOptions, score_pool
from open_qwen2vl.data.scoring.score_files import HASH_SCHEMA
from tests.data.scoring.conftest import rows


def test_hashes(write_tar, sample, photo, encode, tmp_path):
    picture = photo(0, 120, 90)
    smaller = encode(Image.open(io.BytesIO(picture)).resize((60, 45)), "JPEG", quality=60)
    contents = {"a": picture, "again": picture, "smaller": smaller, "other": photo(1, 120, 90)}
    tar = write_tar(
        [member for key, data in contents.items() for member in sample(key, "a cat", data)] + [("z.txt", b"z")]
    )
    score_pool(ScoreOptions([tar], tmp_path, "image-hash", num_workers=1))
    path = tmp_path / "image-hash/00000.parquet"
    assert pq.read_schema(path).equals(HASH_SCHEMA)
    found = {row["key"]: row for row in rows(path)}
    for key, data in contents.items():
        assert found[key]["phash"] == int(str(imagehash.phash(Image.open(io.BytesIO(data)).convert("RGB"))), 16)
        assert found[key]["bytes_hash"] == int(hashlib.sha256(data).hexdigest()[:16], 16)
        assert found[key]["value"] is None and found[key]["reason"] is None
    distances = {key: (found[key]["phash"] ^ found["a"]["phash"]).bit_count() for key in contents}
    assert distances["again"] == 0 and distances["smaller"] <= 4 and distances["other"] > 12
    assert (found["z"]["bytes_hash"], found["z"]["phash"], found["z"]["reason"]) == (None, None, "missing_image")
