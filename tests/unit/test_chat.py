"""Calibration on conversations in which the model writes both sides."""

import re
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from support.commands import Refused
from support.models import RandomModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mla_converters.checkpoints.source import open_source
from mla_converters.text import chat
from mla_converters.text.calibration import calibration_texts
from mla_converters.text.chat import ChatTemplate, Conversations, chat_template

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
DATED = (
    "Today is {{ strftime_now('%d %b %Y') }}. "
    "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


def test_what_a_template_puts_around_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    template = chat_template(tokenizer, 512)
    assert tokenizer.decode(template.opening) == f"{SYSTEM}<|im_start|>user\n"
    assert tokenizer.decode(template.joints[0]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(template.joints[1]) == "<|im_end|>\n<|im_start|>user\n"
    assert template.special >= set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<repo_name>"]))


def test_a_template_does_not_know_the_day(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", DATED)
    assert tokenizer.decode(chat_template(tokenizer, 512).opening) == "Today is 26 Jul 2024. [INST] "


@pytest.mark.slow
def test_conversations_are_what_the_template_makes_of_their_turns(
    smollm2: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Applying the template to the turns that the model wrote gives the same text."""
    with open_source(str(smollm2)) as source, Progress(disable=True) as progress:
        windows = calibration_texts(source, ("chat",), 1024, 3, progress)["used"]
    assert windows.shape == (2, 512)
    for window in windows:
        text = re.sub(r"<\|im_start\|>\w*$", "", tokenizer.decode(window))  # without a header at the end that was cut
        begins = [part.split("\n", 1) for part in text.split("<|im_start|>")[1:]]
        assert len(begins) >= 3  # turns of the system and the user, and an answer
        turns = [{"role": role, "content": said.removesuffix("<|im_end|>\n")} for role, said in begins]
        expected = ["system", *(["user", "assistant"] * len(turns))]
        assert [turn["role"] for turn in turns] == expected[: len(turns)]
        assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(text)


def test_a_turn_ends_with_a_special_token_or_when_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TURN", 3)
    conversations = Conversations(ChatTemplate([1, 2], ([3, 4], [5]), frozenset({3, 9})), 2)
    sampled = [[10, 10], [11, 9], [12, 12], [13, 13], [9, 14], [15, 9], [16, 16]]
    followed = [conversations.follow(torch.tensor(tokens)[:, None])[:, 0].tolist() for tokens in sampled]
    # First: the template's 2, three sampled tokens, and the first joint. Second: a 9 ends an empty turn at once.
    assert [tokens[0] for tokens in followed] == [2, 11, 12, 13, 3, 4, 16]
    assert [tokens[1] for tokens in followed] == [2, 3, 4, 13, 14, 5, 16]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "needs a chat template, and the source has none"),
        ("{{ raise_exception('no users here') }}", "chat template fails: no users here"),
        ("{{ messages | broken }}", "chat template fails"),
        ("{{ 1 // 0 }}", "chat template fails: integer division"),
        ("{% for m in messages %}<u>{{ m.content | upper }}{% endfor %}", "changes turns, joins them or reorders them"),
        (
            "{{ 'a b ' * 300 }}{% for m in messages %} {{ m.content }} {% endfor %}",
            "leaves no room in conversations of 512",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "changes turns, joins them or reorders them"),
    ],
)
def test_refused_templates(refusal: Refused, tmp_path: Path, template: str | None, reason: str) -> None:
    folder = RandomModel().save(tmp_path / "source")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    line = refusal("convert", folder, tmp_path / "out", "--calibration", "self", "--calibration", "chat")
    assert reason in line
    assert line.endswith("Leave chat out.")
    assert sorted(tmp_path.iterdir()) == [folder]
