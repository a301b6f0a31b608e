"""Does QK-norm cost a conversion quality? SmolLM2 as a Qwen3, converted and scored beside SmolLM2 itself.

    python benchmarks/families.py --valid wiki.valid.tokens --test wiki.test.raw

No weights make a Qwen3 compute what a Llama computes, for its queries and keys are normalised. So SmolLM2's weights
are put into a Qwen3, each layer's attention is trained to give what SmolLM2's gives, and then the whole model to
predict what SmolLM2 predicts: minutes, on the validation text. Both models are then converted by the default method
at half and a quarter of their cache, with its refit and by its closed form alone, and compared by how much perplexity
grows. (Mistral, Qwen2 and Mixtral hold SmolLM2's weights unchanged, and ``tests/test_families.py`` shows that their
conversions are the same.)

Rows already in the result file are kept: remove it to measure again, or choose rows with ``--only``.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from common import RESULTS, convert, evaluate, plain_text, write_result
from rich.progress import track
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from demo_model import demo_folder

COMMAND = "python benchmarks/families.py --valid wiki.valid.tokens --test wiki.test.raw"
LENGTH, BATCH = 512, 4
LAYER_WINDOWS, LAYER_STEPS, LAYER_RATE = 16, 64, 0.01
STEPS, RATE = 32, 1e-4
RATIOS = (0.5, 0.25)
RUNS = {"refit": ("--calibration-tokens", "32768"), "closed form": ("--refit-steps", "0")}
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)


def as_qwen3(llama: PreTrainedModel) -> PreTrainedModel:
    """A Qwen3 with a Llama's weights; norms of queries and keys still at one."""
    config = AutoConfig.for_model("qwen3", **{name: getattr(llama.config, name) for name in SHARED})
    qwen3 = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = qwen3.load_state_dict(llama.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("_norm.weight" in name for name in missing.missing_keys)
    return qwen3


def fit_layers(llama: PreTrainedModel, qwen3: PreTrainedModel, windows: torch.Tensor) -> None:
    """Train each attention of ``qwen3`` to give, for the inputs it has in ``llama``, what it gives there."""
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        hidden = llama.model.embed_tokens(windows)
        turns = llama.model.rotary_emb(hidden, positions)
    layers = list(zip(llama.model.layers, qwen3.model.layers, strict=True))
    for teacher, student in track(layers, description="Fitting layers"):
        with torch.no_grad():
            inputs = teacher.input_layernorm(hidden)
            expected = torch.cat([teacher.self_attn(x, turns, None)[0] for x in inputs.split(BATCH)])
            start_norms(student.self_attn, inputs[:BATCH])
        groups = [
            {"params": [weight], "lr": LAYER_RATE * weight.detach().square().mean().sqrt().item()}
            for weight in student.self_attn.parameters()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LAYER_STEPS)
        for step in range(LAYER_STEPS):
            batch = slice(step * BATCH % len(windows), step * BATCH % len(windows) + BATCH)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = student.self_attn(inputs[batch], turns, None)[0]
            size = expected[batch].square().sum(-1)
            error = (output - expected[batch]).square().sum(-1)
            loss = (error / size.clamp(min=1e-3 * size.mean())).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            hidden = torch.cat([teacher(x, position_embeddings=turns) for x in hidden.split(BATCH)])


def start_norms(attention: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Set the norms' weights to the root mean square that each dimension has over tokens."""
    for projection, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
        heads = projection(inputs).unflatten(-1, (-1, attention.head_dim))
        norm.weight.copy_(torch.full_like(norm.weight, heads.square().mean().sqrt().item()))


def distil(llama: PreTrainedModel, qwen3: PreTrainedModel, windows: torch.Tensor) -> None:
    """Train ``qwen3`` to predict what ``llama`` predicts."""
    optimizer = torch.optim.AdamW(qwen3.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in track(range(STEPS), description="Distilling"):
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                expected = llama(batch).logits.float().log_softmax(-1)
            got = qwen3(batch).logits.float().log_softmax(-1)
        loss = F.kl_div(got.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(qwen3.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def make_qwen3(text: Path, folder: Path) -> None:
    """Write SmolLM2 as a Qwen3."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[torch.randperm(len(windows))]
    llama = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32).eval()
    qwen3 = as_qwen3(llama)
    fit_layers(llama, qwen3, windows[:LAYER_WINDOWS])
    distil(llama, qwen3, windows)
    qwen3.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train, convert, score, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--valid", type=Path, required=True, help="wiki.valid.tokens")
    parser.add_argument("--test", type=Path, required=True, help="wiki.test.raw")
    parser.add_argument("--only", default="", help="regular expression of row names")
    parser.add_argument("--qwen3", type=Path, help="where the Qwen3 is kept; trained if there is none yet")
    arguments = parser.parse_args()
    result = RESULTS / "families.json"
    rows: dict[str, dict] = json.loads(result.read_text())["rows"] if result.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        text, folder, out = (Path(scratch) / name for name in ("text.txt", "qwen3", "mla"))
        folder = arguments.qwen3 or folder
        text.write_text(plain_text(arguments.valid))
        if not folder.exists():
            make_qwen3(text, folder)
        for family, source in (("llama", demo_folder()), ("qwen3", folder)):
            original = evaluate(source, arguments.test)["perplexity"]
            for (run, options), ratio in itertools.product(RUNS.items(), RATIOS):
                name = f"{family}, {run}, {ratio}"
                if name in rows or not re.search(arguments.only, name):
                    continue
                report = convert(source, out, "--cache-ratio", str(ratio), "--calibration", str(text), *options)
                perplexity = evaluate(out, arguments.test)["perplexity"]
                rows[name] = {
                    "split": f"{report['kv_lora_rank']}+{report['qk_rope_head_dim']}",
                    "source_perplexity": round(original, 3),
                    "perplexity": round(perplexity, 3),
                    "growth": round(perplexity / original, 4),
                }
                print(name, rows[name], flush=True)
                write_result("families", COMMAND, {"rows": rows})


if __name__ == "__main__":
    main()
