"""What a launcher, such as ``accelerate launch``, decides about a run: devices, processes and micro-batches."""
from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from read_settings import RunSettings

from dtg_core.engine.schedules import scale_lr
from dtg_core.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_accelerator(accumulate: int) -> Accelerator:
    """Accelerate, as the launcher has set it up. UserError: it asks for what cannot be had."""
    import torch
    from accelerate import Accelerator

    if torch.distributed.is_available():
        import torch.distributed.nn  # before there is a process group, which the defaults of its functions would hold for ever

    atexit.register(_leave_process_group)
    if not torch.accelerator.is_available() or torch.cuda.is_available():
        check_devices(os.environ, torch.cuda.device_count())
    try:
        with warnings.catch_warnings():
            # The number of threads that it chooses for several processes on CPUs is fine, so its advice is not needed.
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS", UserWarning)
            return Accelerator(gradient_accumulation_steps=accumulate)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"accelerate: cannot start ({error}) - see accelerate config") from error


def check_devices(environment: Mapping[str, str], gpus: int) -> None:
    """Raise UserError if a launcher's environment asks for GPUs that do not exist, instead of a silent start on the CPU or a
    failure deep in CUDA; or for shards of parameters, of which the teacher's average and the clipping of gradients know nothing.

    Args:
        environment: of this process, as ``accelerate launch`` and ``torchrun`` set it. gpus: how many torch finds.
    """
    for sharded in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{sharded}", "").lower() == "true":
            raise UserError(f"accelerate: {sharded} splits parameters over processes, which training here cannot do - use "
                            "--multi_gpu")
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not gpus and visible not in ("", "-1"):
        raise UserError(f"CUDA_VISIBLE_DEVICES: torch finds none of these GPUs (found {visible}) - unset it, or fix the index, "
                        "the driver or the CUDA build of torch")
    processes = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if not gpus and processes > 1:
        raise UserError(f"processes: {processes} were started for GPUs, and torch finds none - fix the driver or the CUDA build "
                        "of torch, or set ACCELERATE_USE_CPU=true to train on the CPU")
    if 0 < gpus < processes:
        raise UserError(f"processes: {processes} on this machine, which has fewer GPUs (found {gpus}) - start {gpus} of them, or "
                        "make more GPUs visible")


def _leave_process_group() -> None:
    """End Gloo's threads, one of which may still hold a tensor: releasing it while Python exits would abort the process."""
    import torch

    gc.collect()  # the student's DistributedDataParallel, in a cycle, holds the group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fit_to_processes(settings: RunSettings, accelerator: Accelerator, scale: bool) -> RunSettings:
    """The settings with what the launcher decides: its micro-batches override ours, and --scale-lr needs to know them."""
    settings = replace(settings, optim=replace(settings.optim, accumulate=accelerator.gradient_accumulation_steps))
    if scale:
        before = settings.optim.lr
        settings = replace(settings, optim=scale_lr(settings, accelerator.num_processes))
        accelerator.print(f"--scale-lr: optim.lr {before:g} -> {settings.optim.lr:g}")
    return settings
