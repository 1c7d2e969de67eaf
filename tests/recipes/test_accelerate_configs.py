"""Configs of accelerate and the Slurm script, read as `accelerate launch` reads them and run on CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from open_qwen2vl import PackedTrainingArguments, cli
from tests.tars import write_caption_tar

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(path.stem for path in (RECIPES / "accelerate").glob("*.yaml"))
SBATCH = RECIPES / "slurm" / "train.sbatch"
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def launch_arguments(config: str, *options: str):
    """The launcher's arguments, and its parser, as they are after it has read the config."""
    parser = launch_command_parser()
    path = str(RECIPES / "accelerate" / f"{config}.yaml")
    args = parser.parse_args(["--config_file", path, *options, "recipes/pretrain.py"])
    return _validate_launch_command(args)[0], parser


def test_every_setup_has_a_config():
    assert CONFIGS == [
        "ddp_8gpu",
        "fsdp2_8gpu",
        "fsdp2_multinode",
        "hsdp_multinode",
        "single_gpu",
        "two_cpu_processes",
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_accelerate_knows_every_key(config):
    args, parser = launch_arguments(config)
    path = RECIPES / "accelerate" / f"{config}.yaml"
    options = yaml.safe_load(path.read_text())
    known = {action.dest for action in parser._actions}
    # Unknown keys of a config are an error of accelerate's, those of its parts are dropped in silence.
    parts = {name: options.pop(name, {}) for name in ("fsdp_config", "parallelism_config")}
    options |= {name: value for part in parts.values() for name, value in part.items()}
    assert set().union(*parts.values()) <= known
    for name, value in options.items():
        if name not in ("compute_environment", "distributed_type"):
            # An option whose default is not None wins over the config in silence.
            assert getattr(args, name) == value, name
    assert (args.use_fsdp, args.multi_gpu) == ("sdp" in config, options["distributed_type"] == "MULTI_GPU")
    assert args.mixed_precision == "no"


@pytest.mark.parametrize("config", ["fsdp2_8gpu", "fsdp2_multinode", "hsdp_multinode"])
def test_fsdp_options_reach_the_plugin(config):
    args, _ = launch_arguments(config, "--main_process_ip", "localhost", "--machine_rank", "1")
    found = prepare_multi_gpu_env(args)
    with patch_environment(**{name: value for name, value in found.items() if "FSDP" in name}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2DecoderLayer", "SiglipEncoderLayer"]
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert int(args.nproc_per_node) == 8


def test_hsdp_shards_within_a_machine_and_replicates_between():
    """The mesh that accelerate makes of the config, as four machines are told on the command line."""
    sizes = ["--num_machines", "4", "--num_processes", "32", "--parallelism_config_dp_replicate_size", "4"]
    args, _ = launch_arguments("hsdp_multinode", *sizes, "--main_process_ip", "localhost", "--machine_rank", "1")
    found = prepare_multi_gpu_env(args)
    assert found["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    with patch_environment(**{name: value for name, value in found.items() if name.startswith("PARALLELISM")}):
        parallelism = ParallelismConfig()
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size, parallelism.total_size) == (4, 8, 32)
    # Ranks of a machine follow each other, so that they are the inner dimension.
    assert parallelism._get_mesh() == (("dp_replicate", "dp_shard"), (4, 8))


def test_precision_of_the_launcher_counts_as_the_option(tmp_path):
    with patch_environment(ACCELERATE_MIXED_PRECISION="bf16"):
        args = PackedTrainingArguments(str(tmp_path), use_cpu=True)
    assert args.bf16 and not PackedTrainingArguments(str(tmp_path), use_cpu=True).bf16


@pytest.fixture(scope="module")
def config(tmp_path_factory, backbones) -> Path:
    """A YAML for the recipe, of 200 steps unless SIGTERM comes first."""
    folder = tmp_path_factory.mktemp("configs")
    write_caption_tar(folder / "0.tar", ["a cat", "two dogs run", "blue and green"] * 8)
    packs = ["--output", str(folder / "packs"), "--image-seq-length", "4", "--max-length", "64", "--num-workers", "1"]
    assert cli.main(["pack", str(folder / "0.tar"), "--tokenizer", backbones["text"], *packs]) == 0
    options = {f"{part}_model": path for part, path in backbones.items()} | {
        "train_packs": str(folder / "packs"),
        "output_dir": str(folder / "run"),
        "max_steps": 200,
        "save_steps": 5,
        "save_total_limit": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.mark.slow
def test_fsdp_without_gpus_is_refused_in_one_line(config):
    """accelerate would train with DDP in silence."""
    fsdp = ["--config_file", str(RECIPES / "accelerate" / "fsdp2_8gpu.yaml"), "--num_processes", "2"]
    done = subprocess.run(
        ["accelerate", "launch", "--main_process_port", "0", *fsdp, str(RECIPES / "pretrain.py"), str(config)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("pretrain.py: error: ")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr[-3000:]
    assert "FSDP was asked for, but accelerate starts it on accelerators only" in errors[0]
    assert not (config.parent / "run" / "model").exists()


# What the script calls of Slurm, on one machine that stands for two; test_slurm.py has the real one.
SRUN = """#!/bin/bash
shift # --kill-on-bad-exit
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
for task in $tasks; do wait "$task" || exit; done
"""
SCONTROL = """#!/bin/bash
echo 127.0.0.1
"""


def write_programs(folder: Path, **programs: str) -> None:
    for name, content in programs.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("variables", [{}, {"PROCESSES_PER_NODE": "2", "OMP_NUM_THREADS": "3"}])
def test_the_slurm_script_launches_any_recipe(tmp_path, variables):
    """Each machine's launcher, with the environment activated, its share of CPUs, and all arguments as they are."""
    launcher = '#!/bin/bash\necho "$(printf "%s|" "$ACTIVATED" "$OMP_NUM_THREADS" "$@")"\n'
    write_programs(tmp_path, srun=SRUN, scontrol=SCONTROL, accelerate=launcher)
    (tmp_path / "activate").write_text("export ACTIVATED=$NOT_SET+yes\n")
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "30007"}
    job |= {"SLURM_CPUS_PER_TASK": "30", "ACTIVATE": str(tmp_path / "activate"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    arguments = ["recipes/sft.py", "my config.yaml", "--output_dir", "runs/a b"]
    done = subprocess.run(
        ["bash", str(SBATCH), *arguments], env=job | variables, capture_output=True, text=True, cwd=RECIPES.parent
    )
    assert done.returncode == 0, done.stderr
    processes, threads = ("4", "3") if variables else ("8", "7")
    sizes = f"--parallelism_config_dp_replicate_size|2|--parallelism_config_dp_shard_size|{int(processes) // 2}|"
    expected = [
        f"+yes|{threads}|launch|--config_file|recipes/accelerate/hsdp_multinode.yaml|--num_machines|2|--num_processes|"
        f"{processes}|--machine_rank|{node}|{sizes}--main_process_ip|127.0.0.1|--main_process_port|20007|"
        + "".join(f"{argument}|" for argument in arguments)
        for node in (0, 1)
    ]
    assert sorted(done.stdout.splitlines()) == expected
