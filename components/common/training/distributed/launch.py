"""Starts a training stage in several processes, one a GPU: `--num_processes 8 --parallelism zero3`.

The process that was started becomes their supervisor (`supervisor.py`). Under torchrun, `accelerate launch` or a TrainJob a
stage runs as one of their processes instead.

What `parallelism` means is one file of `accelerate/` each, which `accelerate launch --config_file` takes too. A launcher that
has chosen DeepSpeed or FSDP by itself is left alone.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from components.common.core.errors import UserError
from components.common.training.distributed.supervisor import supervise

if TYPE_CHECKING:  # the trainer is a library too, for which pydantic need not be there
    from components.common.stage.parser import ConfigParser

Parallelism = Literal["ddp", "zero2", "zero3", "fsdp2"]

CONFIGS = Path(__file__).parent / "accelerate"
SECONDS_TO_CLEAN_UP = 20.0  # besides `grace_seconds`: from the first process's failure to SIGKILL for the others
# accelerate's names of variables are those of its config files, with these exceptions.
RENAMED = {"zero3_init_flag": "zero3_init"}


def start(parser: "ConfigParser", argv: Sequence[str]) -> None:
    """Makes this process what it is to be: the only one (returns), one of several (joins them), or their supervisor.

    Call it before settings are built and anything is loaded. `--dry_run` stays one process.

    Raises:
        UserError: fewer GPUs are visible than processes want.
        SystemExit: in the supervisor, with the processes' exit code.
    """
    settings = parser.settings(argv)
    parallelism, on_cpu = str(settings["parallelism"]), bool(settings["use_cpu"])
    if settings["dry_run"]:
        return
    if is_launched():
        check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), on_cpu)
        join(parallelism, on_cpu)
        parser.wait_for_others = wait_for_others
    elif settings["num_processes"] > 1:
        check_devices(settings["num_processes"], on_cpu)
        check_packages(parallelism)
        command = [sys.executable, "-m", f"components.{parser.stage}", *argv]
        sys.exit(supervise(command, settings["num_processes"], settings["grace_seconds"] + SECONDS_TO_CLEAN_UP))


# ---- In every process ---------------------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether a launcher, ours or another, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def process_count(num_processes: int) -> int:
    """Processes of the run: those of the launcher where there is one, else as many as are to be started."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else num_processes


def check_devices(processes: int, on_cpu: bool) -> None:
    """Raises UserError when a machine with `processes` processes has fewer GPUs, unless they are to run on the CPU."""
    if processes == 1 or on_cpu:
        return
    import torch

    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if visible >= processes:
        return
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES={masked})" if masked is not None else ""
    raise UserError(
        f"num_processes = {processes}: {processes} GPUs are promised, {visible} are visible{why}; ask for {processes} GPUs, "
        "set num_processes to what is there, or --use_cpu true to run the processes on the CPU"
    )


def check_packages(parallelism: str) -> None:
    """Raises UserError when a way of sharding needs a package that is not installed."""
    if parallelism.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"parallelism = {parallelism}: needs DeepSpeed, which is not installed: pip install 'sapo-pipelines[deepspeed]'"
            ", or take fsdp2, which shards as zero3 does"
        )


def environment(parallelism: str) -> dict[str, str]:
    """What `accelerate launch --config_file accelerate/<parallelism>.yaml` would put into the environment."""
    config = yaml.safe_load((CONFIGS / f"{parallelism}.yaml").read_text(encoding="utf-8"))
    variables = {}
    if (deepspeed := config.get("deepspeed_config")) is not None:
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        variables |= {f"ACCELERATE_DEEPSPEED_{RENAMED.get(k, k).upper()}": _text(v) for k, v in deepspeed.items()}
    if (fsdp := config.get("fsdp_config")) is not None:
        variables["ACCELERATE_USE_FSDP"] = "true"
        variables |= {name.upper(): _text(value) for name, value in fsdp.items()}
    return variables


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def join(parallelism: str, on_cpu: bool) -> None:
    """Joins the other processes of the launch, sharding as told unless the launcher has told accelerate itself."""
    if not (_is_on("ACCELERATE_USE_DEEPSPEED") or _is_on("ACCELERATE_USE_FSDP")):
        check_packages(parallelism)
        os.environ.update(environment(parallelism))
    import torch
    from accelerate import PartialState

    if on_cpu or not torch.accelerator.is_available():
        join_on_cpu()
    else:
        PartialState()


def wait_for_others() -> None:
    """Returns when every process of the launch has come here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def join_on_cpu() -> bool:
    """Connects processes without GPUs (gloo); whether accelerate's state must be kept as it is made here.

    accelerate shards on GPUs only: on a CPU its DeepSpeed plugin wants a state that is not "CPU", and FSDP's that of some
    accelerator. `TrainingArguments` would make the state anew, so where True is returned it must be told to keep it, and this
    called again for the next one.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # Without its kernels for shared memory: a compiler would be busy with them for a minute, and a launch that was killed
        # meanwhile leaves a lock on which all later ones wait for ever. (`deepspeed.comm.torch` is torch itself.)
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        PartialState(backend="gloo")
        return True
    state = PartialState(cpu=True)
    if _is_on("ACCELERATE_USE_FSDP"):
        state.distributed_type = DistributedType.MULTI_XPU
        return True
    return False


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
