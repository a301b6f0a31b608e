"""Scores from transformers: the reference implementation, which gives all logits."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mla_converters.checkpoints.loadable import loadable
from mla_converters.checkpoints.models import Model
from mla_converters.errors import ConversionError
from mla_converters.evaluation.scores import TokenScores

CHUNK = 256
"""Positions whose log-probabilities are held at a time; a window's float32 logits dominate memory anyway."""


def hf_scores(
    models: list[Model],
    reference: Model | None,
    ids: torch.Tensor,
    dtype: torch.dtype,
    device: str,
    advance: Callable[[int], None],
) -> Iterator[tuple[TokenScores, TokenScores | None]]:
    """Score one model after the other, window by window.

    Logits are compared while they exist, so the reference runs again beside each model. Memory: the weights of
    the reference and of one model, and of each the logits of one window, ``4 * length * vocab_size`` bytes.

    Args:
        models: to score, in order.
        reference: what to compare with, or None.
        ids: ``[windows, length]`` int64.
        dtype: of the weights; probabilities are float32 always.
        device: where to run.
        advance: called with the number of windows just done.

    Yields:
        For each model its scores, and the reference's.

    Raises:
        ConversionError: weights cannot be loaded.
    """
    beside = None if reference is None else load_model(reference, dtype, device)
    for model in models:
        yield _score(load_model(model, dtype, device), beside, ids.to(device), advance)


def load_model(model: Model, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Load a model for inference.

    Raises:
        ConversionError: there are no safetensors weights, or they do not fill the model.
    """
    try:
        with loadable(model.path) as path:
            network, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=model.trust_remote_code,
            )
        network.to(device)
    except Exception as error:  # transformers raises whatever the files provoke
        reason = str(error).strip().split("\n")[0]
        if "ignore_mismatched_sizes" in reason:  # an argument of transformers, and no help to the user
            reason = "shapes differ from what its config.json asks for."
        raise ConversionError(f"The weights of {model.name} cannot be loaded: {reason}") from error
    # transformers would fill them with random numbers, and the score would be of another model.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConversionError(
            f"The weights of {model.name} lack {len(missing)} tensors, such as {missing[0]}: convert or download again."
        )
    return network.eval()


@torch.inference_mode()
def _score(
    network: torch.nn.Module, beside: torch.nn.Module | None, ids: torch.Tensor, advance: Callable[[int], None]
) -> tuple[TokenScores, TokenScores | None]:
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    reference: list[tuple[torch.Tensor, torch.Tensor]] = []
    divergence: list[torch.Tensor] = []
    for window in ids:
        logits = _logits(network, window)
        own.append(_losses_and_top1(logits, window[1:]))
        if beside is not None:
            reference_logits = _logits(beside, window)
            reference.append(_losses_and_top1(reference_logits, window[1:]))
            divergence.append(kl_per_token(reference_logits, logits).cpu())
        advance(1)
    if beside is None:
        return _stack(own), None
    return _stack(own, torch.stack(divergence)), _stack(reference)


def _logits(network: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """``[length - 1, vocab_size]``; the last token's has nothing to be compared with."""
    return network(window[None], use_cache=False).logits[0, :-1]


def _losses_and_top1(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    losses = [F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in pairs]
    return torch.cat(losses).cpu(), logits.argmax(-1).cpu()


def kl_per_token(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """``KL(reference || model)`` at each position.

    Args:
        reference: logits ``[tokens, vocab_size]``, any float dtype.
        model: logits of the same shape.

    Returns:
        ``[tokens]`` float32, nats.
    """
    chunks = []
    for p, q in zip(reference.split(CHUNK), model.split(CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        chunks.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    return torch.cat(chunks)


def _stack(windows: list[tuple[torch.Tensor, torch.Tensor]], kl: torch.Tensor | None = None) -> TokenScores:
    losses, top1 = zip(*windows, strict=True)
    return TokenScores(torch.stack(losses), torch.stack(top1), kl)
