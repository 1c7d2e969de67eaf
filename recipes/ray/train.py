"""Any recipe on one or several machines of a Ray cluster: one launcher a machine, as recipes/slurm has it.

    python recipes/ray/train.py --machines 4 --gpus 8 --cpus 96 \
        recipes/pretrain.py recipes/pretrain_2b.yaml --output_dir runs/2b

Ray Train finds the machines, starts the launchers and ends them all where one fails. With `--max_failures 3` it then
starts them again, on other machines where those are lost, and the training resumes from its newest checkpoint. Without
a cluster (`RAY_ADDRESS`, or one that `ray start` has started here) Ray is started on this machine. All machines must
see the folder that this is started in, packs, tars and `output_dir` under the same paths.
"""

import argparse
import os
import socket
import subprocess
import sys

import ray
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

# What Ray sets for a process of its own group: the launcher makes another one.
RAYS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
RAYS_OWN += ("ACCELERATE_TORCH_DEVICE", "OMP_NUM_THREADS")


def parse_options() -> argparse.Namespace:
    """Ours, then the recipe's script with all that follows it."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--machines", type=int, default=1, help="machines, each with one launcher")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each; 0 trains on CPUs")
    parser.add_argument("--cpus", type=int, default=8, help="CPUs of each, for processes and loader workers")
    parser.add_argument("--processes", type=int, help="processes on each machine; as many as GPUs where not given")
    parser.add_argument(
        "--accelerate_config", default="recipes/accelerate/hsdp_multinode.yaml", help="config of accelerate"
    )
    parser.add_argument("--max_failures", type=int, default=0, help="times to start again after a failure")
    parser.add_argument("recipe", nargs=argparse.REMAINDER, help="the script, and its own arguments")
    options = parser.parse_args()
    if not options.recipe:
        parser.error("name the recipe's script, as recipes/pretrain.py, and its arguments")
    options.processes = options.processes or options.gpus
    if not options.processes:
        parser.error("--gpus 0 needs --processes")
    return options


def launch(job: dict) -> None:
    """Run one machine's launcher to its end.

    Args:
        job (`dict`): the options by name, and `folder`, that this program was started in.

    Raises:
        RuntimeError: the launcher has failed.
    """
    machine, machines, processes = dist.get_rank(), dist.get_world_size(), job["processes"]
    with socket.socket() as free:
        free.bind(("", 0))
        meeting = [ray.util.get_node_ip_address(), free.getsockname()[1]]
    dist.broadcast_object_list(meeting)  # at the first machine, behind a port that is free there
    sizes = {"num_machines": machines, "num_processes": machines * processes, "machine_rank": machine}
    sizes |= {"parallelism_config_dp_replicate_size": machines, "parallelism_config_dp_shard_size": processes}
    sizes |= {"main_process_ip": meeting[0], "main_process_port": meeting[1], "config_file": job["accelerate_config"]}
    environment = {name: value for name, value in os.environ.items() if name not in RAYS_OWN}
    environment["OMP_NUM_THREADS"] = str(max(1, job["cpus"] // processes))
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "270"  # a step and a checkpoint may take longer than 30 seconds
    # Ray ends its workers by SIGKILL: the kernel then tells the launcher to stop, which lets the training save.
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "accelerate.commands.launch"]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([*command, *job["recipe"]], cwd=job["folder"], env=environment)
    if done.returncode:
        raise RuntimeError(f"machine {machine}: the launcher ended with exit code {done.returncode}; see its log")


def main() -> None:
    """Ask Ray for the machines and wait for the training."""
    options = parse_options()
    resources = {"CPU": options.cpus, "GPU": options.gpus} if options.gpus else {"CPU": options.cpus}
    scaling = ScalingConfig(
        num_workers=options.machines,
        use_gpu=options.gpus > 0,
        resources_per_worker=resources,
        placement_strategy="SPREAD",
    )
    trainer = TorchTrainer(
        launch,
        train_loop_config={**vars(options), "folder": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),  # of the launchers, which hold no GPU themselves
        scaling_config=scaling,
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.max_failures)),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        sys.exit(f"train.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
