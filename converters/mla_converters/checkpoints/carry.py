"""Carrying over what travels with a model besides its weights, so that OUT cuts text as the source does.

transformers 5 corrects tokenizers by the ``model_type`` beside them or by the repository's id, and a conversion has
another of both. So files are copied untouched where they give the same ids in OUT, and otherwise the tokenizer that the
source was opened with is saved in a form that says all that it does.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mla_converters.checkpoints.side_files import copy_side_files, has_tokenizer
from mla_converters.checkpoints.source import Source
from mla_converters.checkpoints.tokenizer import drops_spaces, load_tokenizer
from mla_converters.checkpoints.tokenizer_check import tokenizer_difference
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import read_json_object, write_json

SETTINGS = "tokenizer_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Takes a ``tokenizer.json`` as it is, in transformers 4 and 5 and in vLLM, whatever the ``model_type``."""
OVERRIDING = ("special_tokens_map.json", "added_tokens.json")  # read besides, and say again what the new files say
# Keys that make transformers take other code or files, or change tokenizer.json while loading; or that say where a
# tokenizer was loaded from.
REDIRECTING = ("auto_map", "fast_tokenizer_files", "fix_mistral_regex", "is_local", "local_files_only", "backend")
OF_THE_CLASS = ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")


def carry_side_files(source: Source, folder: Path) -> list[str]:
    """Copy a source's side files into a folder, and make sure that its tokenizer does the same there.

    Args:
        source: the model.
        folder: that becomes OUT. Its ``config.json`` is written as far as tokenizers read it.

    Returns:
        Warnings.

    Raises:
        ConversionError: the tokenizer would do something else in OUT.
    """
    copy_side_files(source.folder, folder, source.trust_remote_code)
    if not has_tokenizer(source.folder):
        return []
    described = {name: value for name, value in source.raw_config.items() if not name.startswith("_")}
    names = {"architectures": [source.family.mla_architecture], "model_type": source.family.mla_model_type}
    write_json(folder / "config.json", described | names)
    _carry_tokenizer(source, folder)
    return [_dropped_spaces(source)] if drops_spaces(source.tokenizer, source.folder) else []


def _carry_tokenizer(source: Source, folder: Path) -> None:
    if _difference(source, folder) is None:
        return
    if source.tokenizer.is_fast:
        _save_plainly(source.tokenizer, folder)
    if (difference := _difference(source, folder)) is not None:
        raise ConversionError(
            f"The tokenizer of {source.name} would do something else in OUT than in the source: {difference}. Save it "
            f"with transformers as a {PLAIN_CLASS}, and convert with that."
        )


def _difference(source: Source, folder: Path) -> str | None:
    try:
        carried = load_tokenizer(folder, source.trust_remote_code)
    except ConversionError as error:
        return str(error)
    return tokenizer_difference(source.tokenizer, carried)


def _save_plainly(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save what a tokenizer does, as files that are loaded without looking at anything beside them."""
    for name in OVERRIDING:
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    settings: dict[str, Any] = {name: getattr(tokenizer, name) for name in OF_THE_CLASS}
    settings |= {"tokenizer_class": PLAIN_CLASS}
    saved = {name: value for name, value in read_json_object(folder / SETTINGS).items() if name not in REDIRECTING}
    text = json.dumps(saved | settings, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _dropped_spaces(source: Source) -> str:
    return (
        f"The source's tokenizer drops all spaces, because transformers opens it as {type(source.tokenizer).__name__}, "
        "which is not what its tokenizer.json is; OUT does the same. If the model is on the hub, convert it by its id; "
        f'else write "tokenizer_class": "{PLAIN_CLASS}" into the source\'s tokenizer_config.json, which most families '
        "then follow, and convert it again."
    )
