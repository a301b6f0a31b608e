"""Does every family keep its quality? Small models of each, trained here, converted, scored.

    python benchmarks/families.py

A Llama and a Qwen3 of the same size are trained on bytes of Python's standard library. Qwen2, Mistral and Mixtral are
the trained Llama under their names, Qwen3-MoE is the trained Qwen3; each expert is the MLP. Each is converted to a half
and a quarter of its cache, calibrated on modules that it was trained on and scored on modules that it was not.
"""

import argparse
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from common import convert, cost, evaluate, write_result
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from as_family import as_family

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
HELD_OUT = ("argparse", "calendar", "difflib", "fractions", "gzip", "imaplib", "mailbox", "shelve", "tarfile", "uuid")
STEPS, WINDOWS, LENGTH = 3000, 16, 256
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
EXPERTS = 4  # two of which see a token


def texts() -> tuple[str, str]:
    """What trains and calibrates, and what is held out."""
    modules = sorted(LIBRARY.glob("*.py"))
    parts: dict[bool, list[str]] = {True: [], False: []}
    for module in modules:
        parts[module.stem in HELD_OUT].append(module.read_text(encoding="utf-8", errors="ignore"))
    return "\n".join(parts[False]), "\n".join(parts[True])


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def train(family: str, ids: torch.Tensor, folder: Path) -> None:
    """A small model of ``family``, trained on token ids ``[tokens]``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    for _ in track(range(STEPS), description=f"Training {family}"):
        starts = torch.randint(0, len(ids) - LENGTH, (WINDOWS,))
        window = torch.stack([ids[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    save_tokenizer(folder)


def main() -> None:
    """Train, convert, score, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seen, held_out = folder / "seen.txt", folder / "held-out.txt"
        for path, text in zip((seen, held_out), texts(), strict=True):
            path.write_text(text)
        # The tokenizer numbers bytes in the order of its alphabet.
        save_tokenizer(folder / "tokens")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokens")
        ids = tokenizer(seen.read_text(), return_tensors="pt", verbose=False).input_ids[0]
        for family in ("llama", "qwen3"):
            train(family, ids, folder / family)
        for trained, families in (("llama", ("qwen2", "mistral", "mixtral")), ("qwen3", ("qwen3_moe",))):
            for family in families:
                as_family(folder / trained, family, folder / family, EXPERTS, gate_scale=1.0)
        rows = []
        for family in ("llama", "mistral", "qwen2", "mixtral", "qwen3", "qwen3_moe"):
            source = evaluate(folder / family, held_out)["perplexity"]
            for ratio in ("0.5", "0.25"):
                out = folder / f"{family}-mla"
                options = ["--cache-ratio", ratio, "--calibration", str(seen)]
                report = convert(folder / family, out, *options)
                perplexity = evaluate(out, held_out)["perplexity"]
                rows.append(
                    {
                        "family": family,
                        "cache_ratio": float(ratio),
                        "split": f"{report['kv_lora_rank']}+{report['qk_rope_head_dim']}",
                        "source_perplexity": round(source, 4),
                        "perplexity": round(perplexity, 4),
                        "ratio": round(perplexity / source, 4),
                        **cost(report),
                    }
                )
                print(rows[-1], flush=True)
    write_result("families", "python benchmarks/families.py", {"rows": rows})


if __name__ == "__main__":
    main()
