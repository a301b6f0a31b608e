"""Checks that a converted checkpoint is whole: files, configuration, tensors, tokenizer, and predictions."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.manifest import manifest_problems
from mla_converters.checkpoints.models import Model, converted_config, find_model, read_config
from mla_converters.checkpoints.quantised.config import find_quantisation
from mla_converters.checkpoints.quantised.tensors import dequantised
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.rope_scaling import context_length, scale_rope
from mla_converters.checkpoints.tensors import tensor_problems
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.checkpoints.tokenizer_check import tokenizer_difference
from mla_converters.errors import ConversionError
from mla_converters.evaluation.run import compare
from mla_converters.options import VerifyOptions
from mla_converters.proof import PROBE
from mla_converters.reports.conversion import WRITER, ConversionReport
from mla_converters.reports.verification import Check, Verification

EXACT_KL = 0.01  # nats per token; a lossless conversion differs by rounding alone
LEAST_AGREEMENT = 0.1  # share of equal likeliest tokens; below, the predictions have nothing to do with the source's
SHOWN = 5  # number of a check's problems that are named


def verify(folder: Path, options: VerifyOptions | None = None) -> Verification:
    """Check a folder that ``vllm-mla convert`` wrote.

    Args:
        folder: the checkpoint.
        options: the source to compare tokenizers and predictions with; None for the defaults.

    Returns:
        Each check with its problems; later checks are left out where an earlier one makes them pointless.

    Raises:
        ConversionError: the folder is no converted checkpoint, or the source is no model.
    """
    options = options or VerifyOptions()
    description = converted_config(folder)
    checks = [Check(name="files", problems=manifest_problems(folder), detail="size and SHA-256 of every file")]
    config, check = _config(folder)
    checks.append(check)
    trusted = options.trust_remote_code
    with ExitStack() as stack:
        reference = None if options.source is None else find_model(options.source, stack, trusted)
        if config is not None:
            checks.append(_tensors(folder, config))
            check, ids = _tokenizer(folder, reference, trusted, config.vocab_size)
            checks.append(check)
        # Another tokenizer than the source's is no reason to leave out whether the weights compute the same.
        if config is not None and ids and not any(check.problems for check in checks if check.name != "tokenizer"):
            checks.append(_predictions(folder, description, reference, ids, trusted))
    ok = not any(check.problems for check in checks)
    return Verification(model=str(folder), source=options.source, ok=ok, checks=checks)


def _config(folder: Path) -> tuple[PretrainedConfig | None, Check]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers validates with many exception types
        return None, Check(name="config", problems=[str(error).strip().split("\n")[0]])
    widths = {sum(config.cached_sizes(layer)) for layer in range(config.num_hidden_layers)}
    cached = f"{min(widths)}" if len(widths) == 1 else f"{min(widths)} to {max(widths)}"
    detail = f"{config.model_type}, {cached} numbers cached per token and layer"
    model = Model(str(folder), str(folder), config)
    if model.cache_format is not None and model.cached_bytes is not None:
        detail += f", packed into {model.cached_bytes:g} bytes"
    return config, Check(name="config", problems=[], detail=detail)


def _tensors(folder: Path, config: PretrainedConfig) -> Check:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        quantisation = find_quantisation(config.to_dict())
        checkpoint = dequantised(Checkpoint(folder), quantisation, config)
    except ConversionError as error:
        return Check(name="tensors", problems=[str(error)])
    problems = tensor_problems(checkpoint, skeleton)
    for name in checkpoint.names() if not problems else ():
        try:
            checkpoint.tensor(name)
        except ConversionError as error:
            problems.append(str(error))
    count = len(checkpoint.names())
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    detail = f"{count} tensors: names, shapes, finite numbers"
    return Check(name="tensors", problems=problems[:SHOWN] + more, detail=detail)


def _tokenizer(
    folder: Path, reference: Model | None, trust_remote_code: bool, vocab_size: int
) -> tuple[Check, list[int]]:
    """Whether the tokenizer works, and does what the source's does; and the sample's ids, of the source if there is
    one. No ids where a tokenizer cannot be loaded, or is of a larger vocabulary."""
    name = "tokenizer"
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        expected = load_tokenizer(reference.path, trust_remote_code) if reference else tokenizer
    except ConversionError as error:
        return Check(name=name, problems=[str(error)]), []
    difference = tokenizer_difference(expected, tokenizer) if reference else None
    problems = [f"differs from the source's: {difference}"] if difference else []
    ids = expected(PROBE).input_ids
    if max(ids, default=0) >= vocab_size:
        return Check(name=name, problems=[*problems, f"gives ids beyond the vocabulary of {vocab_size} tokens"]), []
    detail = f"cuts the sample into {len(ids)} tokens{', as the source does' if reference else ''}"
    return Check(name=name, problems=problems, detail=detail), ids


def _predictions(
    folder: Path, description: dict[str, Any], reference: Model | None, ids: list[int], trust_remote_code: bool
) -> Check:
    """Run the sample through the model, and through its source."""
    model = Model(str(folder), str(folder), read_config(folder, trust_remote_code), trust_remote_code)
    length = min(len(ids), context_length(model.config))
    report = _report(folder, description)
    if reference is not None and report is not None and report.rope_scaling is not None:
        reference = replace(reference, config=scale_rope(reference.config, report.rope_scaling))
    row = compare(model, reference, torch.tensor([ids[:length]]))
    detail = f"perplexity {row.perplexity:.2f} on {length} tokens"
    if row.kl is None or row.top1_agreement is None:
        return Check(name="predictions", problems=[], detail=detail)
    detail += f"; KL {row.kl:.4f} from the source, likeliest token the same for {row.top1_agreement:.0%}"
    problems = []
    if report is not None and report.lossless:
        if row.kl > EXACT_KL:
            problems.append(f"the conversion says it loses nothing, but the KL is above {EXACT_KL}")
    elif row.top1_agreement < LEAST_AGREEMENT and not _trained_on_text(report):
        problems.append(f"the likeliest token is the source's for less than {LEAST_AGREEMENT:.0%}")
    return Check(name="predictions", problems=problems, detail=detail)


def _trained_on_text(report: ConversionReport | None) -> bool:
    """Whether a model was trained to predict other text than its source does."""
    return report is not None and report.healing is not None and report.healing.lm_held_out is not None


def _report(folder: Path, description: dict[str, Any]) -> ConversionReport | None:
    """The report in ``config.json``; None where there is none."""
    report = description.get("mla_conversion")
    if not isinstance(report, dict):
        return None
    return ConversionReport.parse(report, f"{folder / 'config.json'}, mla_conversion", WRITER)
