"""What a user can do about the failures that PyTorch reports, in one line each."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from dtg_core.structures import StepBatch


def advice(error: RuntimeError, recent: Sequence[StepBatch], evaluating: bool, accelerator: Accelerator) -> str | None:
    """The failure and its remedy; None: an error of the program.

    Args:
        recent: micro-batches of the last step, empty before the first. evaluating: it was an evaluation after that step that
            failed. accelerator: names device and process.
    """
    text, device = str(error).strip(), accelerator.device
    step = f"step {recent[0].step if recent else 0}"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        peak = f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB, " if device.type == "cuda" else ""
        if evaluating:
            return (f"{step}: out of memory on {device} ({peak}in the evaluation) - lower run.evaluate_batch, "
                    "views.test_short_edge and views.long_edge, or use --mixed_precision bf16")
        views = [view for batch in recent[:1] for view in (batch.labeled, batch.unlabeled and batch.unlabeled.student) if view]
        shapes = " and ".join("x".join(map(str, view.pixels.shape)) for view in views)
        return (f"{step}: out of memory on {device} ({peak}views of {shapes}) - lower data.unlabeled_per_device and "
                "data.labeled_per_device (optim.accumulate keeps the batch), lower views.short_edge and views.long_edge, or use "
                "--mixed_precision bf16")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = text.partition("\n")[0]
        return f"run.compile: the backbone was not compiled ({reason}) - a C++ compiler is needed; or run.compile=false"
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in text:
        reason = " ".join(text.rpartition("\n")[2].split()).partition(". ")[0]
        return (f"process {accelerator.process_index} of {accelerator.num_processes}: {step}: another process has ended or does "
                f"not answer ({reason}) - see what it says")
    return None
