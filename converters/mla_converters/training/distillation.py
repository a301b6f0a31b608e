"""Training a converted model to predict what its source predicts (knowledge distillation, arXiv 1503.02531)."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mla_converters.methods.attention_aware.refit import parts_apart, relative_rates
from mla_converters.options import HealOptions
from mla_converters.streaming.layers import calibration_autocast, native_bfloat16

CHUNK = 512  # positions whose logits exist at a time
WARMUP = 5  # steps
RATE = 0.002  # of a model that is 1 nat per token from its source, in steps of 512 tokens
LONGEST, SHORTEST = 1024, 256  # tokens in a window
LITTLE = 0.2  # nats per token, up to which each window is seen once, and beyond it twice
SAVES = 20  # times, so that an interruption loses at most a twentieth of the steps
SAVED_BYTES = 12  # of a weight that is trained: itself and Adam's two moments, in float32
COMPLETE = "trainer_state.json"  # what Trainer writes last of a checkpoint


class Distillation(nn.Module):
    """A student beside its teacher; the loss is ``KL(teacher || student)`` (arXiv 1503.02531, section 2, at
    temperature 1).

    Only what is trained is registered, so that is all that Trainer saves and that a checkpoint holds.

    Args:
        student: the converted model; of it, only ``trained`` changes.
        teacher: its source.
        trained: parameters of the student.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._models = (student, teacher)  # a tuple, for modules would be registered

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """``loss``: the mean over all positions of ``[windows, tokens]`` token ids, nats."""
        student, teacher = self._models
        with torch.no_grad():
            expected = teacher.model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = student.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"loss": _Divergence.apply(hidden, expected, student.lm_head, teacher.lm_head) / input_ids.numel()}


class _Divergence(torch.autograd.Function):
    """``KL(teacher || student)`` from hidden states ``[windows, tokens, D]``, summed over positions, nats.

    Logits are by far the largest tensors. So there are only those of a chunk at a time, and while they are there, the
    gradient to the hidden states is computed too: it is small enough to be kept, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, expected: torch.Tensor, student: nn.Module, teacher: nn.Module
    ) -> torch.Tensor:
        trains = ctx.needs_input_grad[0]
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        chunks = (tensor.flatten(0, 1).split(CHUNK) for tensor in (hidden, expected))
        for states, target_states in zip(*chunks, strict=True):
            target = teacher(target_states).float().log_softmax(-1)
            with torch.set_grad_enabled(trains):
                states = states.detach().requires_grad_(trains)
                predicted = student(states).float().log_softmax(-1)
                loss = F.kl_div(predicted, target, reduction="sum", log_target=True)
            if trains:
                gradients += torch.autograd.grad(loss, states)
            total += loss.detach()
        if trains:
            ctx.save_for_backward(torch.cat(gradients).view(hidden.shape))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None, None


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


@contextmanager
def distillation(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[Distillation]:
    """The student's attentions ready to be trained, for the time of a ``with`` block.

    The teacher gets the student's tensors where both have the same, so that they are in memory once.
    """
    own = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        if name in own and torch.equal(parameter, own[name]):
            parameter.data = own[name].data
    attentions = [layer.self_attn for layer in student.model.layers]
    for model in (student, teacher):
        model.requires_grad_(False).eval()
    with parts_apart(attentions):
        trained = [parameter.requires_grad_() for attention in attentions for parameter in attention.parameters()]
        for parameter in trained:
            parameter.data = parameter.data.float()  # steps are smaller than what bfloat16 can tell apart
        yield Distillation(student, teacher, trained)


@torch.no_grad()
def held_out_kl(model: Distillation, windows: torch.Tensor, device: str) -> float:
    """Mean ``KL(teacher || student)`` over ``[windows, tokens]``, nats per token."""
    with calibration_autocast(device):
        losses = [model(window[None].to(device))["loss"].item() for window in windows]
    return sum(losses) / len(losses)


def suited_length(divergence: float) -> int:
    """Tokens in a window for a model that is so many nats per token from its source.

    Where little was lost, it was lost at long distances; where much was, more steps on fewer tokens bring more.
    Measured, each window once, at 0.16 nats (1,024 better than 512, and that than 256) and at 1.9 (256 better than 512,
    and that than 1,024); at 0.48, 512 twice is better than 1,024 once."""
    length = LONGEST
    while length > SHORTEST and length * divergence > 400:
        length //= 2
    return length


def suited_passes(divergence: float) -> int:
    """How often a model that is so many nats per token from its source should see each window.

    Measured at 0.10 nats (twice loses 0.8% more perplexity than once), at 0.31 (0.4% less), at 0.48 (2% less, in
    windows of 512 for 1,024) and at 1.1 (5% less)."""
    return 2 if divergence > LITTLE else 1


def suited_rate(divergence: float, tokens: int) -> float:
    """A learning rate for a model that is so many nats per token from its source, in steps of so many tokens.

    The more was lost, the further have weights to go; the fewer tokens in a step, the less is known of where to.
    Measured at 0.16 nats (512 tokens: 0.0006 and 0.001 alike, 0.002 worse; 256: 0.0004 and 0.0006 alike) and at 1.8
    (512: 0.002 and 0.003 alike, 0.001 worse; 256: 0.002 better than 0.0014; 128: 0.002 fails, 0.0014 does not)."""
    return RATE * math.sqrt(divergence * tokens / 512)


def train(
    model: Distillation,
    windows: torch.Tensor,
    steps: int,
    rate: float,
    options: HealOptions,
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
        bf16=native_bfloat16(options.device),
        use_cpu=torch.device(options.device).type == "cpu",
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
