"""Does QK-norm make conversions worse? SmolLM2 is turned into a Qwen3, and both are converted and scored.

    python -m benchmarks.families --valid wiki.valid.tokens --test wiki.test.raw

No weights make a Qwen3 compute the same as a Llama, because it normalises queries and keys. Therefore:

1. SmolLM2's weights are put into a Qwen3.
2. The attention of each layer is trained to give the same output as SmolLM2's.
3. The whole model is trained to predict the same as SmolLM2. Steps 2 and 3 take minutes, on the validation text.

Such training changes queries and keys, whatever the family. To tell its effect from the norm's, the Qwen3 is turned
back into a Llama by the same steps.

All three models are then converted by the default method to half and to a quarter of their cache: by its closed form
alone, with its refit, and with its refit and healing. They are compared by the growth of their perplexity over 8
windows of the test split, as in the other benchmarks, and over 64, because 8 are too few to show differences of a
percent. The conversions to half of the cache with the refit are scored over all 294 windows, too.

(Mistral, Qwen2 and Mixtral can hold SmolLM2's weights unchanged; ``tests/conversion/test_families.py`` shows that their
conversions are the same.)

Rows that are in the result file already are kept: remove it to measure them again, or choose rows with ``--only``.
"""

import itertools
import re
import tempfile
from pathlib import Path

import torch
from rich.progress import track
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common import convert, evaluate, heal, measured_rows, plain_text, row_parser, write_result
from mla_converters.methods.attention_aware.refit import relative_rates
from mla_converters.support.devices import calibration_autocast
from scripts.demo_model import demo_folder

COMMAND = "python -m benchmarks.families --valid wiki.valid.tokens --test wiki.test.raw"
LENGTH, BATCH = 512, 4
LAYER_WINDOWS, LAYER_STEPS, LAYER_RATE = 16, 64, 0.01
STEPS, RATE = 32, 1e-4
RATIOS = (0.5, 0.25)
# The teacher of each trained model. The first word of a model's name is its family.
TEACHERS = {"qwen3": "llama", "llama from qwen3": "qwen3"}
CLOSED_FORM, REFIT = ("--refit-steps", "0"), ("--calibration-tokens", "65536")
WINDOWS, MOST_WINDOWS = [64], [64, 294]  # beside the first 8; 294 are all
DEFAULT = ("refit", 0.5)  # scored over most windows
RUNS = {"closed form": CLOSED_FORM, "refit": REFIT, "refit, healed": REFIT}  # a healed row heals the model before it
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


def carried(teacher: PreTrainedModel, family: str) -> PreTrainedModel:
    """A model of ``family`` with the teacher's weights, except for the norms of queries and keys."""
    config = AutoConfig.for_model(family, **{name: getattr(teacher.config, name) for name in SHARED})
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    differ = student.load_state_dict(teacher.state_dict(), strict=False)
    assert all("_norm.weight" in name for name in (*differ.missing_keys, *differ.unexpected_keys))
    return student


def fit_layers(model: PreTrainedModel, copy: PreTrainedModel, windows: torch.Tensor) -> None:
    """Train each attention of ``copy`` to give the same output as in ``model``, for its inputs there."""
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        hidden = model.model.embed_tokens(windows)
        turns = model.model.rotary_emb(hidden, positions)
    layers = list(zip(model.model.layers, copy.model.layers, strict=True))
    for teacher, student in track(layers, description="Fitting layers"):
        with torch.no_grad():
            inputs = teacher.input_layernorm(hidden)
            expected = torch.cat([teacher.self_attn(x, turns, None)[0] for x in inputs.split(BATCH)])
            start(teacher.self_attn, student.self_attn, inputs[:BATCH])
        optimizer = torch.optim.Adam(relative_rates(student.self_attn.parameters(), LAYER_RATE), betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LAYER_STEPS)
        for step in range(LAYER_STEPS):
            batch = slice(step * BATCH % len(windows), step * BATCH % len(windows) + BATCH)
            with calibration_autocast("cpu"):
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


def start(teacher: torch.nn.Module, student: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Make the student's queries and keys start with the size of the teacher's.

    A student with norms gets that size as the weights of its norms. In a student without norms, the projections are
    multiplied by the weights of the teacher's norms and divided by the size that they give without.
    """
    for name in "qk":
        projection = getattr(student, f"{name}_proj")
        heads = projection(inputs).unflatten(-1, (-1, student.head_dim))
        size = heads.square().mean().sqrt()
        if hasattr(student, f"{name}_norm"):
            getattr(student, f"{name}_norm").weight.fill_(size)
        else:
            weight = getattr(teacher, f"{name}_norm").weight / size
            projection.weight.mul_(weight.repeat(heads.shape[-2])[:, None])


def distil(model: PreTrainedModel, copy: PreTrainedModel, windows: torch.Tensor) -> None:
    """Train ``copy`` to predict the same as ``model``."""
    optimizer = torch.optim.AdamW(copy.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in track(range(STEPS), description="Distilling"):
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
        with calibration_autocast("cpu"):
            with torch.no_grad():
                expected = model(batch).logits.float().log_softmax(-1)
            got = copy(batch).logits.float().log_softmax(-1)
        loss = F.kl_div(got.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(copy.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def make_copy(source: Path, family: str, text: Path, folder: Path) -> None:
    """Turn ``source`` into a model of another family and write it into ``folder``."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[torch.randperm(len(windows))]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    copy = carried(model, family)
    fit_layers(model, copy, windows[:LAYER_WINDOWS])
    distil(model, copy, windows)
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def source_folder(name: str, models: Path, text: Path) -> Path:
    """The folder of a model, which is trained if it is not in ``models``, as is its teacher before it."""
    if name not in TEACHERS:
        return demo_folder()
    folder = models / name.replace(" ", "-")
    if not folder.exists():
        make_copy(source_folder(TEACHERS[name], models, text), name.split()[0], text, folder)
    return folder


def main() -> None:
    """Train, convert, score, write the result file."""
    parser = row_parser(__doc__)
    parser.add_argument(
        "--models", type=Path, help="folder for trained models; those that are in it are not trained again"
    )
    arguments = parser.parse_args()
    rows = measured_rows("families")
    with tempfile.TemporaryDirectory() as scratch:
        text, out, healed = (Path(scratch) / name for name in ("text.txt", "mla", "healed"))
        models = arguments.models or Path(scratch)
        text.write_text(plain_text(arguments.valid))
        for source_name in ("llama", *TEACHERS):
            names = {f"{source_name}, {run}, {ratio}": (run, ratio) for ratio, run in itertools.product(RATIOS, RUNS)}
            names = {name: how for name, how in names.items() if name not in rows and re.search(arguments.only, name)}
            if not names:
                continue
            source = source_folder(source_name, models, text)
            original = evaluate(source, arguments.test)["perplexity"]
            converted = None
            for name, (run, ratio) in names.items():
                options = ("--cache-ratio", str(ratio), "--latent-bits", "16", "--calibration", str(text), *RUNS[run])
                if options != converted:
                    report = convert(source, out, *options)
                    converted = options
                model = out
                if run.endswith("healed"):
                    heal(out, healed, "--text", str(text))
                    model = healed
                perplexity = evaluate(model, arguments.test)["perplexity"]
                rows[name] = {
                    "split": f"{report['kv_lora_rank']}+{report['qk_rope_head_dim']}",
                    "source_perplexity": round(original, 3),
                    "perplexity": round(perplexity, 3),
                    "growth": round(perplexity / original, 4),
                }
                for windows in MOST_WINDOWS if (run, ratio) == DEFAULT else WINDOWS:
                    many = evaluate(model, arguments.test, "--windows", str(windows), "--reference", str(source))
                    rows[name][f"of_{windows}_windows"] = {
                        "perplexity": round(many["perplexity"], 3),
                        "growth": round(many["perplexity_ratio"], 4),
                        "stderr": round(many["perplexity_ratio_stderr"], 4),
                        "kl": round(many["kl"], 4),
                    }
                print(name, rows[name], flush=True)
                write_result("families", COMMAND, {"rows": rows})


if __name__ == "__main__":
    main()
