"""Measures how much better a chat model becomes if its conversion is calibrated on conversations.

    python -m benchmarks.chat --valid wiki.valid.tokens --test wiki.test.raw

Converts SmolLM2-135M-Instruct to half of its cache by the map alone, without a refit or least squares. The row ``text``
is calibrated on WikiText-2's validation split, ``self`` on text that the model writes, ``chat`` on conversations.
``vllm-mla eval`` scores in float32: KL divergence from the source, and perplexity. The texts are

- conversations: the questions below, written by hand, and answers sampled from the source; the first 8 windows of 512
  tokens,
- WikiText-2's raw test split,
- the source code of Python's ``argparse``.

Rows that are in the result file already are kept: remove it to measure them again, or choose rows with ``--only``.
"""

import re
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import CODE, convert, evaluate, measured_rows, plain_text, row_parser, write_result
from scripts.demo_model import demo_folder

COMMAND = "python -m benchmarks.chat --valid wiki.valid.tokens --test wiki.test.raw"
OPTIONS = ("--kv-lora-rank", "128", "--qk-rope-head-dim", "64", "--refit-steps", "0", "--without", "least-squares")
ANSWER = 192  # most tokens of an answer
QUESTIONS = (
    "What should I cook tonight with eggs, rice and an old onion?",
    "Why is the sky blue? Explain it to a child.",
    "Write a short email asking my landlord to repair the heating.",
    "How do I undo my last git commit without losing the changes?",
    "Give me three ideas for a birthday present for my grandmother.",
    "What is the difference between a virus and a bacterium?",
    "Translate into French: 'The train leaves at half past nine.'",
    "My cat sleeps all day. Is that normal?",
    "Write a Python function that counts the words in a file.",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "How much water should I drink when I go running?",
    "A shirt costs 40 euros and is reduced by 15%. What do I pay?",
    "Who was Marie Curie, and what did she discover?",
    "Write a poem of four lines about autumn.",
    "I have a job interview tomorrow. How do I stay calm?",
    "What does HTTP status code 404 mean, and how is it different from 500?",
    "Plan a weekend in Rome for two people who like art.",
    "Why do we have leap years?",
    "Rewrite this politely: 'You are late again, this must stop.'",
    "What are the pros and cons of working from home?",
    "Explain what a mortgage is as simply as you can.",
    "Which planets can be seen without a telescope?",
    "How do I remove a red wine stain from a white carpet?",
    "List five habits that help people fall asleep.",
)


def rows_to_measure(text: Path) -> dict[str, list[str]]:
    """The name of every row, and the options that say on which texts it is calibrated."""
    origins = {"text": str(text), "self": "self", "chat": "chat"}
    names = ("text", "self", "chat", "text, self", "text, chat", "self, chat", "text, self, chat")
    return {name: [f"--calibration={origins[origin]}" for origin in name.split(", ")] for name in names}


@torch.inference_mode()
def conversations(model: Path) -> str:
    """The questions and answers that the model samples, written by its chat template."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = source.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=ANSWER)
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    both = ([*turns, {"role": "assistant", "content": answer}] for turns, answer in zip(asked, answers, strict=True))
    return "".join(tokenizer.apply_chat_template(turns, tokenize=False) for turns in both)


def main() -> None:
    """Measure the rows that are missing; write the result file after every row."""
    arguments = row_parser(__doc__).parse_args()
    rows = measured_rows("chat")
    with tempfile.TemporaryDirectory() as scratch:
        text, chat, out = (Path(scratch) / name for name in ("calibration.txt", "chat.txt", "model"))
        text.write_text(plain_text(arguments.valid))
        source = demo_folder()
        chat.write_text(conversations(source))
        scored = {"chat": (chat, "--length", "512"), "wikitext": (arguments.test,), "code": (CODE,)}
        for name, calibration in rows_to_measure(text).items():
            if name in rows or not re.search(arguments.only, name):
                continue
            convert(source, out, *OPTIONS, *calibration)
            rows[name] = {}
            for what, how in scored.items():
                row = evaluate(out, *how, "--reference", str(source))
                rows[name] |= {f"kl_{what}": round(row["kl"], 4), f"growth_{what}": round(row["perplexity_ratio"], 4)}
            print(name, rows[name], flush=True)
            write_result("chat", COMMAND, {"options": " ".join(OPTIONS), "rows": rows})


if __name__ == "__main__":
    main()
