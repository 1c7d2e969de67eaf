import io
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from open_qwen2vl.cli import main
from open_qwen2vl.data.scoring import ScoreOptions, find_score_files, score_pool
from open_qwen2vl.data.scoring.clip import ClipScorer
from open_qwen2vl.data.scoring.pairs import RawPair
from open_qwen2vl.data.storage.tars import index_shard, read_member
from open_qwen2vl.places import open_file
from tests.data.scoring.conftest import TINY_CLIP, rows

UID = "0" * 32


@pytest.fixture
def scorer(clip_folder):
    return ClipScorer(f"local-dir:{clip_folder}", batch_size=4)


def expected_scores(clip_folder, tar):
    """Cosine similarities by open_clip alone, one pair at a time."""
    name = f"local-dir:{clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    scores = {}
    with open_file(tar) as file, torch.no_grad():
        for sample in index_shard(tar).samples:
            data = {ext: read_member(file, f"{sample.key}.{ext}", *sample.members[ext]) for ext in sample.members}
            image = Image.open(io.BytesIO(data.get("jpg") or data["png"]))
            one = model.encode_image(preprocess(image)[None], normalize=True)
            other = model.encode_text(tokenizer([data["txt"].decode()]), normalize=True)
            scores[sample.key] = (one @ other.T).item()
    return scores


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 1), (5, 3), (256, None)])
def test_equals_open_clip(clip_folder, pool, tmp_path, batch_size, num_workers):
    model = f"local-dir:{clip_folder}"
    report = score_pool(
        ScoreOptions([pool], tmp_path, "clip", model=model, batch_size=batch_size, num_workers=num_workers)
    )
    assert (report.samples, report.shards, dict(report.skipped)) == (21, 3, {})
    for tar in sorted(pool.iterdir()):
        found = {row["key"]: row["value"] for row in rows(tmp_path / "clip" / f"{tar.stem}.parquet")}
        assert found == pytest.approx(expected_scores(clip_folder, tar), abs=1e-5)
        assert np.std(list(found.values())) > 0.01
    first = rows(tmp_path / "clip/00001.parquet")[0]
    assert (first["uid"], first["scorer"], first["model"]) == (f"{7:032x}", "clip", model)


def test_any_number_of_threads_gives_the_same_bytes(clip_folder, pool, tmp_path):
    for threads in (1, 4):
        score_pool(
            ScoreOptions(
                [pool],
                tmp_path / str(threads),
                "clip",
                model=f"local-dir:{clip_folder}",
                batch_size=3,
                num_workers=threads,
            )
        )
    for name in ("00000", "00001", "00002"):
        paths = [tmp_path / threads / "clip" / f"{name}.parquet" for threads in "14"]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_name_and_file_of_weights(clip_folder, pool, tmp_path):
    """A model by its name in open_clip, with weights of a file, read without unpickling code."""
    (tmp_path / "tiny-tower.json").write_text(__import__("json").dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model(f"local-dir:{clip_folder}").state_dict(), weights)
    report = score_pool(
        ScoreOptions([pool], tmp_path, "clip", name="dfn", model="tiny-tower", pretrained=str(weights))
    )
    assert report.samples == 21
    row = rows(tmp_path / "dfn/00000.parquet")[0]
    assert (row["scorer"], row["model"]) == ("dfn", f"tiny-tower/{weights}")


class Harmful:
    def __reduce__(self):
        return print, ("code of a checkpoint was run",)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-32", None, "--model ViT-B-32: .*could not be loaded"),
        ("ViT-B-32", "nowhere.pt", "--pretrained nowhere.pt: .*nowhere.pt.* not a known tag or valid file"),
        ("ViT-Q-1", "openai", "--model ViT-Q-1 --pretrained openai"),
        ("local-dir:/nowhere", None, "--model local-dir:/nowhere"),
        ("local-dir:{clip}", "openai", "leave --pretrained out"),
        ("ViT-B-32", "{harmful}", "--pretrained .*harmful.pt"),
    ],
)
def test_models_that_cannot_be_loaded(clip_folder, tmp_path, capsys, model, pretrained, message):
    (tmp_path / "harmful.pt").write_bytes(pickle.dumps({"a": Harmful()}, protocol=2))
    pretrained = pretrained and pretrained.format(harmful=tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match=message):
        ClipScorer(model.format(clip=clip_folder), pretrained)
    assert "code of a checkpoint" not in capsys.readouterr().out


def test_a_tokenizer_with_code_is_refused(clip_folder, tmp_path):
    """The config of a model may ask transformers to trust the code of a repository."""
    import json

    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_model.safetensors").symlink_to(clip_folder / "open_clip_model.safetensors")
    (folder / "code.py").write_text("raise SystemExit('code of a repository was run')")
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="contains custom code"):
        ClipScorer(f"local-dir:{folder}")


def test_hub_model(clip_folder, tmp_path, monkeypatch, pool):
    """`hf-hub:` reads config and weights of the repository; here from a cache as huggingface_hub makes it."""
    repository = tmp_path / "hub/models--lab--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in clip_folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    score_pool(ScoreOptions([pool], tmp_path, "clip", model="hf-hub:lab/tiny"))
    found = {row["key"]: row["value"] for row in rows(tmp_path / "clip/00000.parquet")}
    assert found == pytest.approx(expected_scores(clip_folder, pool / "00000.tar"), abs=1e-5)


def test_a_picture_that_would_grow_beyond_memory(scorer, encode):
    with pytest.raises(ValueError, match="too narrow") as error:
        scorer.prepare(RawPair("a", UID, encode(Image.new("L", (100_000, 1))), "a line"))
    assert error.value.reason == "image_too_large"


def test_scores_that_are_nan(clip_folder, tmp_path, pool):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").symlink_to(clip_folder / "open_clip_config.json")
    weights = load_file(clip_folder / "open_clip_model.safetensors")
    weights["text_projection"] = weights["text_projection"] * float("nan")
    save_file(weights, folder / "open_clip_model.safetensors")
    report = score_pool(ScoreOptions([pool], tmp_path, "clip", model=f"local-dir:{folder}"))
    assert dict(report.skipped) == {"nan_score": 21}
    assert {(row["value"], row["reason"]) for row in rows(tmp_path / "clip/00000.parquet")} == {(None, "nan_score")}


def test_kept_embeddings_are_those_of_the_scores(pool, tmp_path, clip_folder, capsys):
    command = ["score", str(pool), "--scorer", "clip", "--model", f"local-dir:{clip_folder}", "--batch-size", "4"]
    command += ["--output", str(tmp_path / "scores"), "--device", "cpu"]
    assert main([*command, "--keep-embeddings"]) == 0
    scored = {row["uid"]: row["value"] for row in rows(tmp_path / "scores/clip/00000.parquet")}
    kept = rows(tmp_path / "scores/clip/embeddings/00000.parquet")
    assert [row["uid"] for row in kept] == list(scored)
    for row in kept:
        assert np.dot(row["image"], row["text"]) == pytest.approx(scored[row["uid"]], abs=2e-3)
        assert np.linalg.norm(row["image"]) == pytest.approx(1, abs=1e-3) and len(row["text"]) == 16
    assert find_score_files([tmp_path / "scores"]) == sorted((tmp_path / "scores/clip").glob("*.parquet"))
    files = sorted((tmp_path / "scores/clip/embeddings").glob("*.parquet"))
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(before[1][:200])
    capsys.readouterr()
    assert main([*command, "--keep-embeddings"]) == 0
    assert "2 (1 done before)" in capsys.readouterr().out and [file.read_bytes() for file in files] == before
    files[2].write_bytes(before[0])
    assert main([*command, "--keep-embeddings"]) == 0
    assert "1 (2 done before)" in capsys.readouterr().out and [file.read_bytes() for file in files] == before
    assert main(command) == 2
    assert "--keep-embeddings" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--scorer basic takes no --keep-embeddings"):
        ScoreOptions([pool], tmp_path, "basic", keep_embeddings=True)
