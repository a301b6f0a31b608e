"""Whether a converted checkpoint is whole: files, configuration, tensors, tokenizer, and what it predicts."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import vllm_mla_plugin.hf  # noqa: F401 - registers the MLA models with transformers
from mla_converters.checkpoints.families import FAMILIES, architecture_names
from mla_converters.checkpoints.manifest import manifest_problems
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.tensors import tensor_problems
from mla_converters.checkpoints.tokenizer import load_tokenizer
from mla_converters.errors import ConversionError
from mla_converters.evaluation.run import EvalOptions, evaluate
from mla_converters.support.json_files import read_json_object

EXACT_KL = 0.01  # nats per token; a lossless conversion differs by rounding alone
LEAST_AGREEMENT = 0.1  # of likeliest tokens; below, the predictions have nothing to do with the source's
SHOWN = 5  # problems of a check that are named
SAMPLE = """\
The lighthouse stood at the end of a narrow path, and for most of the year nobody walked there. In winter the waves
reached the lower windows; in summer the grass grew as high as the door. The keeper wrote down the weather every
morning, the ships that passed, and the hours in which the lamp had burned. When the lamp was replaced by an electric
one, the letters he sent to the town became shorter, and in the end they held nothing but the date and his name. Years
later a student found the books in the cellar of the town hall. She counted the ships, compared them with the records
of three harbours, and showed that the keeper had missed only four vessels in twenty-six years. Two of them had passed
in fog. The other two, as far as anybody knows, had never existed.
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        problems: what is wrong; empty if nothing is.
        detail: what was seen.
    """

    name: str
    problems: list[str]
    detail: str


def verify(folder: Path, source: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Check a folder that ``vllm-mla convert`` wrote.

    Args:
        folder: the checkpoint.
        source: what it was converted from, to compare predictions on a short text; None leaves that out.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Returns:
        ``ok``, and each check with its problems; later checks are left out where an earlier one makes them pointless.

    Raises:
        ConversionError: the folder is no converted checkpoint, or the source is no model.
    """
    description = converted_config(folder)
    checks = [Check("files", manifest_problems(folder), "size and SHA-256 of every file")]
    config, check = _config(folder)
    checks.append(check)
    if config is not None:
        checks += [_tensors(folder, config), _tokenizer(folder, trust_remote_code)]
    if not any(check.problems for check in checks):
        checks.append(_predictions(folder, description, source, trust_remote_code))
    return {
        "model": str(folder),
        "source": source,
        "ok": not any(check.problems for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def converted_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder that ``vllm-mla convert`` wrote.

    Raises:
        ConversionError: it is none.
    """
    description = read_json_object(folder / "config.json")
    architectures = {family.mla_architecture for family in FAMILIES.values()}
    if not architectures.intersection(architecture_names(description)):
        raise ConversionError(f"{folder} is not a checkpoint that vllm-mla convert wrote: its architecture is another.")
    return description


def _config(folder: Path) -> tuple[PretrainedConfig | None, Check]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers validates with many exception types
        return None, Check("config", [str(error).strip().split("\n")[0]], "")
    widths = {sum(config.cached_sizes(layer)) for layer in range(config.num_hidden_layers)}
    cached = f"{min(widths)}" if len(widths) == 1 else f"{min(widths)} to {max(widths)}"
    return config, Check("config", [], f"{config.model_type}, {cached} numbers cached per token and layer")


def _tensors(folder: Path, config: PretrainedConfig) -> Check:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        checkpoint = Checkpoint(folder)
    except ConversionError as error:
        return Check("tensors", [str(error)], "")
    problems = tensor_problems(checkpoint, skeleton)
    for name in checkpoint.names() if not problems else ():
        try:
            checkpoint.tensor(name)
        except ConversionError as error:
            problems.append(str(error))
    count = len(checkpoint.names())
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return Check("tensors", problems[:SHOWN] + more, f"{count} tensors: names, shapes, finite numbers")


def _tokenizer(folder: Path, trust_remote_code: bool) -> Check:
    try:
        count = len(load_tokenizer(folder, trust_remote_code)(SAMPLE).input_ids)
    except ConversionError as error:
        return Check("tokenizer", [str(error)], "")
    return Check("tokenizer", [], f"cuts the sample into {count} tokens")


def _predictions(folder: Path, description: dict[str, Any], source: str | None, trust_remote_code: bool) -> Check:
    """Run the sample through the model, and through its source."""
    ids = load_tokenizer(folder, trust_remote_code)(SAMPLE).input_ids
    length = min(len(ids), description["max_position_embeddings"])
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "sample.txt"
        text.write_text(SAMPLE)
        options = EvalOptions(text=text, windows=1, length=length, trust_remote_code=trust_remote_code)
        (row,) = evaluate([str(folder)], options, reference=source, quiet=True)["models"]
    detail = f"perplexity {row['perplexity']:.2f} on {length} tokens"
    if source is None:
        return Check("predictions", [], detail)
    detail += f"; KL {row['kl']:.4f} from the source, likeliest token the same for {row['top1_agreement']:.0%}"
    problems = []
    if (description.get("mla_conversion") or {}).get("method") == "exact":
        if row["kl"] > EXACT_KL:
            problems.append(f"the conversion says it is exact, but the KL is above {EXACT_KL}")
    elif row["top1_agreement"] < LEAST_AGREEMENT:
        problems.append(f"the likeliest token is the source's for less than {LEAST_AGREEMENT:.0%}")
    return Check("predictions", problems, detail)
