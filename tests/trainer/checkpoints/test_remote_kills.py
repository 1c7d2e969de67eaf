"""Killed at random moments while it reads a bucket through a bad network: the losses of an undisturbed local run."""

import json
import os
import random
import shutil
import signal

import fsspec
import pytest

from open_qwen2vl import cli
from tests.fork_server import fork_program
from tests.tars import write_caption_tar
from tests.trainer.checkpoints.test_kills import ARGUMENTS, SCRIPT, Runs, assert_same, reads, save_open_qwen2vl

KILLS = 10


class RemoteRuns(Runs):
    """Lives whose processes find the bucket's server in their environment."""

    def start(self, output_dir, config="config", file_limit=0) -> int:
        log = output_dir.with_name(f"{output_dir.name}.log")
        variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        arguments = [SCRIPT, self.folder / f"{config}.json", output_dir]
        environment = {"TOKENIZERS_PARALLELISM": "false", **variables}
        return fork_program("python", *arguments, log=log, environment=environment, file_limit=file_limit)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ranges", "cache"])
def test_kills_while_a_bucket_is_read(way, tmp_path, bucket, proxy, backbones):
    model = save_open_qwen2vl(tmp_path / "model", backbones)
    rng, packs = random.Random(0), {"local": [], "remote": []}
    for name, count, weight in (("dogs", 60, 2), ("cats", 40, 1)):
        captions = [" ".join(rng.choices(["a", "photo", name], k=rng.randint(1, 12))) for _ in range(count)]
        write_caption_tar(tmp_path / f"{name}.tar", captions)
        fsspec.filesystem("s3").put_file(str(tmp_path / f"{name}.tar"), f"{bucket}/{name}.tar")
        for place, folder in (("local", tmp_path), ("remote", bucket)):
            plan = ["--output", str(tmp_path / place / name), "--image-seq-length", "4", "--max-length", "48"]
            data = ["pack", f"{folder}/{name}.tar", "--processor", str(model), "--num-workers", "1"]
            assert cli.main([*data, *plan]) == 0
            packs[place].append({"path": str(tmp_path / place / name), "weight": weight})
    runs = RemoteRuns(tmp_path)
    arguments = ARGUMENTS | {"shuffle_window": 1}
    for name, cache in (("local", {}), ("remote", {"cache": str(tmp_path / "cache")} if way == "cache" else {})):
        settings = {"packs": packs[name], "model": str(model), "arguments": arguments, **cache}
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    whole = tmp_path / "whole"
    assert runs.live(whole, config="local") == 0, (tmp_path / "whole.log").read_text()[-3000:]
    proxy.faults.throttle, proxy.faults.cut, proxy.faults.hang = 0.1, 0.1, 0.02
    run, kills, lives = tmp_path / "run", 0, 0
    while kills < KILLS:
        lives += 1
        assert lives < 100
        if rng.random() < 0.3:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # cold or warm, it is the same run
        code = runs.live(run, rng.randrange(len(reads(whole)[0]) // 2), rng.uniform(0, 0.2), config="remote")
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), (tmp_path / f"{run.name}.log").read_text()[-3000:]
        if code == 0:
            assert_same(run, whole)
            run = tmp_path / f"run{lives}"
    while runs.live(run, config="remote") != 0:
        pass
    assert_same(run, whole)
    assert proxy.faults.counts["cut"] + proxy.faults.counts["throttle"] > 0
