"""The files that travel with a model besides its configuration and weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "tekken.json")
"""Some of which every tokenizer has."""
SIDE_FILES = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "*.tiktoken",
    "*chat_template*.jinja",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "SYSTEM_PROMPT*",
    "LICEN[CS]E*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
    "COPYING*",
)
CODE = "*.py"  # travels too where it is trusted
DESCRIPTIONS = (
    "config.json",
    "modules.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
"""Say what a model is; read, but not carried over. So is the card."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OTHER_WEIGHTS = (
    "consolidated*",
    "*/*.safetensors",
)  # the same model once more, in Mistral's format or another precision


def side_files(folder: Path, trust_remote_code: bool) -> Iterator[Path]:
    """Files of a source that its conversion keeps unchanged; each once, sorted within a pattern."""
    seen = set()
    for pattern in _side_patterns(trust_remote_code):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path not in seen:
                seen.add(path)
                yield path


def copy_side_files(folder: Path, to: Path, trust_remote_code: bool) -> None:
    """Copy the side files of a source into another folder."""
    for path in side_files(folder, trust_remote_code):
        copy = to / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds any of a tokenizer's files."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def hub_patterns(trust_remote_code: bool) -> tuple[list[str], list[str]]:
    """What to fetch of a repository and what not, as ``snapshot_download`` takes it.

    The hub's patterns also match across ``/``, unlike those of a folder, so sub-folders are left out by name.
    """
    wanted = [*DESCRIPTIONS, "README.md", *WEIGHTS, *_side_patterns(trust_remote_code)]
    return wanted, [*OTHER_WEIGHTS, *(f"*/{pattern}" for pattern in wanted if "/" not in pattern)]


def _side_patterns(trust_remote_code: bool) -> tuple[str, ...]:
    return (*SIDE_FILES, CODE) if trust_remote_code else SIDE_FILES
