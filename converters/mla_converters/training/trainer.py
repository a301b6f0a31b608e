"""Training with transformers' Trainer, which goes on from the last checkpoint of an earlier run."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mla_converters.errors import ConversionError, UnfinishedError
from mla_converters.training.checkpoints import BYTES, load_training, save_training
from mla_converters.training.distillation import Distillation
from mla_converters.training.trained import learning_rates

WARMUP = 5  # steps
SAVES = 20  # checkpoints in a run, so that an interruption loses at most a twentieth of the steps
COMPLETE = "trainer_state.json"  # the file that Trainer writes last in a checkpoint
SCHEDULE = "scheduler.pt"
BETAS = (0.9, 0.975)  # of Adam


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        steps: of Adam.
        rate: learning rate as a fraction of each matrix's root mean square; cosine decay.
        at_a_time: windows that each device computes at a time.
        accumulated: how often it does that in a step.
        seed: decides the order of the windows.
        dtype: of matrix products.
        hidden_steps: how many steps at the start teach hidden states.
        checkpointing: whether layers are computed twice, so that less has to be kept.
    """

    steps: int
    rate: float
    at_a_time: int
    accumulated: int
    seed: int
    dtype: torch.dtype
    hidden_steps: int = 0
    checkpointing: bool = False


class Ordered(Dataset):
    """The windows of all steps in their order, which does not depend on the number of processes.

    All windows are seen before any is seen again.

    Args:
        windows: the arguments of :meth:`Distillation.forward` for each window.
        count: windows of all steps.
        seed: decides the order.
    """

    def __init__(self, windows: Sequence[dict[str, Any]], count: int, seed: int) -> None:
        self._windows = windows
        passes = range(-(-count // len(windows)))
        seeds = ((seed + i) % 2**64 for i in passes)  # generators take no larger ones
        orders = [torch.randperm(len(windows), generator=torch.Generator().manual_seed(own)) for own in seeds]
        self._order = torch.cat(orders)[:count]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._windows[int(self._order[index])]


class _Watch(TrainerCallback):
    """Reports each step and its loss, and stops a training whose loss is no number."""

    def __init__(self, advance: Callable[[int, float], None]) -> None:
        self._advance = advance

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: object, logs: dict | None = None, **kwargs: object
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            _stop(state.global_step, Path(str(args.output_dir)))
        self._advance(state.global_step, logs["loss"])


class _Stages(TrainerCallback):
    """Lets a model learn hidden states in its first steps."""

    def __init__(self, model: Distillation, hidden_steps: int) -> None:
        self._model = model
        self._hidden_steps = hidden_steps

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self._model.learns_hidden = state.global_step < self._hidden_steps


def _stop(step: int, folder: Path) -> None:
    """Refuse to go on. A checkpoint is kept, unless there was little more than warm-up before it."""
    kept = _last_checkpoint(folder)
    what = f"the loss of step {step} is not a finite number"
    if kept is None or step <= WARMUP:
        raise ConversionError(f"Training made the model worse: {what}. Lower --learning-rate.")
    raise UnfinishedError(
        f"Training stopped, because {what}. Its last checkpoint is {kept}. If the same happens again, lower "
        "--learning-rate and start again."
    )


class OneDevice(TrainingArguments):
    """Trainer's arguments with the device of this process; by default Trainer uses all GPUs, or the first one.

    Args:
        own_device: the device of this process.
    """

    def __init__(self, own_device: str, **named: Any) -> None:
        self._own_device = torch.device(own_device)
        super().__init__(**named)

    @property
    def device(self) -> torch.device:
        _ = super().device  # prepares Trainer, which makes the first GPU the current one
        if self._own_device.type == "cuda":
            torch.cuda.set_device(self._own_device.index or 0)
        return self._own_device

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)

    @property
    def place_model_on_device(self) -> bool:
        return False  # it is there already


class _Trainer(Trainer):
    """Trainer with relative learning rates, a fixed order of windows, and checkpoints of trained weights only.

    Args:
        rate: see :class:`Schedule`.
    """

    def __init__(self, *arguments: Any, rate: float, **named: Any) -> None:
        self._rate = rate
        super().__init__(*arguments, **named)
        if isinstance(self.model, FSDPModule):
            # accelerate would otherwise wrap the model again; so it only sets the precision.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)

    def create_optimizer(self, *_: object) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.Adam(learning_rates(self.model.student, self._rate), betas=BETAS)
        return self.optimizer

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write nothing: the weights are in the same files as the moments."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_training(self.model, self._adam, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _load_from_checkpoint(self, *_: object, **__: object) -> None:
        """Load nothing yet: the weights are in the same files as the moments."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_training(self.model, self._adam, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))
        for group, rate in zip(self._adam.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer itself, whose state accelerate's wrapper only shows."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


def train(
    model: Distillation,
    windows: Sequence[dict[str, Any]],
    schedule: Schedule,
    device: str,
    folder: Path,
    advance: Callable[[int, float], None],
) -> None:
    """Train; if an earlier run left a checkpoint in ``folder``, go on from it. All processes call this together.

    Args:
        model: changed in place.
        windows: the arguments of :meth:`Distillation.forward` for each window.
        schedule: steps, rate, batches.
        device: the device of this process.
        folder: the folder of Trainer's checkpoints, which all processes see.
        advance: called with the number of steps done and the loss of the last one.

    Raises:
        OSError: the disk is full.
        UnfinishedError: the loss is no number any more. The last checkpoint before that is kept.
        ConversionError: the same, where there was no checkpoint yet.
    """
    steps = schedule.steps
    arguments = OneDevice(
        device,
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=schedule.at_a_time,
        gradient_accumulation_steps=schedule.accumulated,
        lr_scheduler_type="cosine",
        warmup_steps=min(WARMUP, steps - 1),
        max_grad_norm=0,  # off, because a norm over tensors of arbitrary scale says nothing
        save_strategy="steps",
        save_steps=max(1, steps // SAVES),
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        seed=schedule.seed % 2**32,  # numpy takes no other
        bf16=schedule.dtype == torch.bfloat16,
        use_cpu=torch.device(device).type == "cpu",
        ddp_find_unused_parameters=schedule.hidden_steps > 0,  # the output head is not used in them
    )
    if schedule.checkpointing:
        model.student.gradient_checkpointing_enable({"use_reentrant": False})
    processes = arguments.world_size
    count = steps * schedule.at_a_time * schedule.accumulated * processes
    trainer = _Trainer(model, arguments, train_dataset=Ordered(windows, count, schedule.seed), rate=schedule.rate)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Stages(model, schedule.hidden_steps))
    if trainer.is_world_process_zero():
        trainer.add_callback(_Watch(advance))
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    except (SafetensorError, RuntimeError, OSError) as error:  # a full disk may raise any of them
        needed = BYTES * sum(weight.numel() for weight in model.trained)
        if folder.exists() and shutil.disk_usage(folder).free < needed:  # the main process may have removed it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is complete."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
