"""Training with transformers' Trainer, on one device, from the last checkpoint that an earlier run left."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mla_converters.options import HealOptions
from mla_converters.support.devices import native_bfloat16
from mla_converters.training.distillation import Distillation
from mla_converters.training.relative import relative_rates

WARMUP = 5  # steps
SAVES = 20  # times, so that an interruption loses at most a twentieth of the steps
SAVED_BYTES = 12  # of a weight that is trained: itself and Adam's two moments, in float32
COMPLETE = "trainer_state.json"  # the file that Trainer writes last of a checkpoint


class _Steps(TrainerCallback):
    """Tells of each step, and of its loss."""

    def __init__(self, advance: Callable[[int, float], None]) -> None:
        self._advance = advance

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: object, logs: dict | None = None, **kwargs: object
    ) -> None:
        if logs and "loss" in logs:
            self._advance(state.global_step, logs["loss"])


class OneDevice(TrainingArguments):
    """Trainer's arguments for one device, where its own would take all GPUs."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def train(
    model: Distillation,
    windows: torch.Tensor,
    steps: int,
    rate: float,
    options: HealOptions,
    device: str,
    folder: Path,
    advance: Callable[[int, float], None],
) -> None:
    """Train, or go on from what an earlier run left in ``folder``.

    Args:
        model: changed in place.
        windows: ``[windows, tokens]`` token ids to train on, each once before any comes again.
        steps: of Adam.
        rate: in the first steps, relative to each matrix's root mean square; falls by a cosine.
        options: batch and seed.
        device: where both models are.
        folder: for Trainer's checkpoints.
        advance: called with the number of steps done and the last one's loss.

    Raises:
        OSError: the disk is full.
    """
    arguments = OneDevice(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=min(WARMUP, steps - 1),
        max_grad_norm=0,  # of tensors whose scales are arbitrary, a norm says nothing
        save_strategy="steps",
        save_steps=max(1, steps // SAVES),
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        seed=options.seed,
        bf16=native_bfloat16(device),
        use_cpu=torch.device(device).type == "cpu",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": window} for window in windows],
        optimizers=(
            torch.optim.Adam(relative_rates(model.parameters(), rate), betas=(0.9, 0.975)),
            None,
        ),
        callbacks=[_Steps(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    except (SafetensorError, RuntimeError) as error:  # either is what a full disk comes out as
        if shutil.disk_usage(folder).free < SAVED_BYTES * sum(weight.numel() for weight in model.parameters()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _last_checkpoint(folder: Path) -> str | None:
    """The newest that was written to its end."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
