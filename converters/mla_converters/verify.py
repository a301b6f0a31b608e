"""Checks that a converted checkpoint is whole: files, configuration, tensors, tokenizer, and predictions."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.manifest import manifest_problems
from mla_converters.checkpoints.models import converted_config
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import ConversionError
from mla_converters.evaluation.run import evaluate
from mla_converters.options import EvalOptions, VerifyOptions
from mla_converters.reports.conversion import WRITER, ConversionReport
from mla_converters.reports.verification import Check, Verification

EXACT_KL = 0.01  # nats per token; a lossless conversion differs by rounding alone
LEAST_AGREEMENT = 0.1  # share of equal likeliest tokens; below, the predictions have nothing to do with the source's
SHOWN = 5  # number of a check's problems that are named
SAMPLE = """\
The lighthouse stood at the end of a narrow path, and for most of the year nobody walked there. In winter the waves
reached the lower windows; in summer the grass grew as high as the door. The keeper wrote down the weather every
morning, the ships that passed, and the hours in which the lamp had burned. When the lamp was replaced by an electric
one, the letters he sent to the town became shorter, and in the end they held nothing but the date and his name. Years
later a student found the books in the cellar of the town hall. She counted the ships, compared them with the records
of three harbours, and showed that the keeper had missed only four vessels in twenty-six years. Two of them had passed
in fog. The other two, as far as anybody knows, had never existed.
"""


def verify(folder: Path, options: VerifyOptions | None = None) -> Verification:
    """Check a folder that ``vllm-mla convert`` wrote.

    Args:
        folder: the checkpoint.
        options: the source to compare predictions with; None for the defaults.

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
    if config is not None:
        checks += [_tensors(folder, config), _tokenizer(folder, options.trust_remote_code)]
    if not any(check.problems for check in checks):
        checks.append(_predictions(folder, description, options))
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
    return config, Check(name="config", problems=[], detail=detail)


def _tensors(folder: Path, config: PretrainedConfig) -> Check:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        checkpoint = Checkpoint(folder)
    except ConversionError as error:
        return Check(name="tensors", problems=[str(error)])
    problems = checkpoint.problems(skeleton)
    for name in checkpoint.names() if not problems else ():
        try:
            checkpoint.tensor(name)
        except ConversionError as error:
            problems.append(str(error))
    count = len(checkpoint.names())
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    detail = f"{count} tensors: names, shapes, finite numbers"
    return Check(name="tensors", problems=problems[:SHOWN] + more, detail=detail)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Check:
    try:
        count = len(load_tokenizer(folder, trust_remote_code)(SAMPLE).input_ids)
    except ConversionError as error:
        return Check(name="tokenizer", problems=[str(error)])
    return Check(name="tokenizer", problems=[], detail=f"cuts the sample into {count} tokens")


def _predictions(folder: Path, description: dict[str, Any], options: VerifyOptions) -> Check:
    """Run the sample through the model, and through its source."""
    ids = load_tokenizer(folder, options.trust_remote_code)(SAMPLE).input_ids
    length = min(len(ids), description["max_position_embeddings"])
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "sample.txt"
        text.write_text(SAMPLE)
        scored = EvalOptions(
            text=text,
            windows=1,
            length=length,
            reference=options.source,
            trust_remote_code=options.trust_remote_code,
        )
        (row,) = evaluate([str(folder)], scored, quiet=True).models
    detail = f"perplexity {row.perplexity:.2f} on {length} tokens"
    if row.kl is None or row.top1_agreement is None:
        return Check(name="predictions", problems=[], detail=detail)
    detail += f"; KL {row.kl:.4f} from the source, likeliest token the same for {row.top1_agreement:.0%}"
    problems = []
    if _says_lossless(folder, description):
        if row.kl > EXACT_KL:
            problems.append(f"the conversion says it loses nothing, but the KL is above {EXACT_KL}")
    elif row.top1_agreement < LEAST_AGREEMENT:
        problems.append(f"the likeliest token is the source's for less than {LEAST_AGREEMENT:.0%}")
    return Check(name="predictions", problems=problems, detail=detail)


def _says_lossless(folder: Path, description: dict[str, Any]) -> bool:
    report = description.get("mla_conversion")
    if not isinstance(report, dict):
        return False
    return ConversionReport.parse(report, f"{folder / 'config.json'}, mla_conversion", WRITER).lossless
