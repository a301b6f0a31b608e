"""``vllm-mla convert``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import (
    Force,
    NewFolder,
    ReportFile,
    TrustTokenizer,
    check_choice,
    check_output,
    chosen_device,
    print_warnings,
    quiet_transformers,
    write_report,
)
from mla_converters.errors import ConversionError

EPILOG = """
**Examples**

Half the cache, calibrated on text the model writes itself:

`vllm-mla convert HuggingFaceTB/SmolLM2-135M-Instruct ./smol-mla`

DeepSeek's sizes, which have the fastest GPU kernels, calibrated on your text and on the model's own:

`vllm-mla convert ./Llama-3.1-8B ./llama-mla --kv-lora-rank 512 --qk-rope-head-dim 64 --calibration my.txt
--calibration self`

**Next**: `vllm serve OUT`
"""


def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or .gguf file.")],
    out: NewFolder,
    method: Annotated[
        str,
        typer.Option(
            help="**attention-aware** loses least; **transmla** (arXiv 2502.07864) and **mha2mla** (arXiv "
            "2502.14837, which trains afterwards) for comparison; **exact** changes nothing, neither outputs nor "
            "cache size."
        ),
    ] = "attention-aware",
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="Width of the cached latent.", rich_help_panel="Cache size")
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(help="Dimensions that keep RoPE, cached too.", rich_help_panel="Cache size")
    ] = None,
    cache_ratio: Annotated[
        float | None,
        typer.Option(
            help="Cache size as a share of the source's, instead of --kv-lora-rank. [default: 0.5]",
            rich_help_panel="Cache size",
        ),
    ] = None,
    refit_steps: Annotated[
        int,
        typer.Option(
            help="Muon steps of each layer's refit; 0 is faster and loses more.",
            rich_help_panel="Method attention-aware",
        ),
    ] = 96,
    layer_sizes: Annotated[
        str,
        typer.Option(
            help="Cache **same** in all layers, or **measured**: more where it matters more, the same in total. GPUs "
            "do not serve it yet.",
            rich_help_panel="Method attention-aware",
        ),
    ] = "same",
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave an ingredient out, to see what it buys (may be repeated).",
            rich_help_panel="Method attention-aware",
        ),
    ] = None,
    freqfold: Annotated[
        str,
        typer.Option(
            help="Neighbouring RoPE frequencies treated as one: a number, or **auto** to search.",
            rich_help_panel="Method transmla",
        ),
    ] = "auto",
    rope_keep: Annotated[
        str | None,
        typer.Option(
            help="Which pairs of a head keep RoPE: **2-norm**, **high**, **low** or **uniform**. [default: 2-norm]",
            rich_help_panel="Method mha2mla",
        ),
    ] = None,
    svd: Annotated[
        str | None,
        typer.Option(
            help="SVD of keys and values together (**joint**) or apart (**split**). [default: joint]",
            rich_help_panel="Method mha2mla",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file like what you will serve; **self**: text sampled from the model; **chat**: conversations "
            "sampled with its chat template. May be repeated, all have an equal share: with **self** beside it, what "
            "your text leaves out is kept too. [default: self]",
            rich_help_panel="Calibration",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int,
        typer.Option(
            help="How many tokens, in windows of 2,048 (512 with transmla and mha2mla).", rich_help_panel="Calibration"
        ),
    ] = 16384,
    seed: Annotated[int, typer.Option(help="Same seed, same output to the byte.", rich_help_panel="Calibration")] = 0,
    max_context: Annotated[
        int | None,
        typer.Option(help="Limit the context. A source with a sliding window converts up to the window."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. [default: the source's; float32 for quantised GGUF]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where layers run: cpu, cuda, cuda:1 … [default: the GPU, if there is one]")
    ] = None,
    trust_remote_code: TrustTokenizer = False,
    json_file: ReportFile = None,
    force: Force = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload OUT to a new repository.", rich_help_panel="Hub")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it. [default: private]", rich_help_panel="Hub")
    ] = False,
) -> None:
    """Write an MLA checkpoint of SOURCE that `vllm serve OUT` runs."""
    check_output("--json", json_file)
    if public and not push_to_hub:
        raise ConversionError("--public is about --push-to-hub: give both.")
    # Imported here, not above: `--help` should not wait for torch, nor every command for the hub's client.
    from mla_converters.checkpoints.hub import check_push, push

    if push_to_hub:
        check_push(push_to_hub)
    from mla_converters.cards.card import update_card
    from mla_converters.convert import convert as run
    from mla_converters.methods.attention_aware.layer_sizes import LayerSizes
    from mla_converters.methods.attention_aware.run import Ingredient
    from mla_converters.methods.mha2mla.map import Keep, Svd
    from mla_converters.options import Method, Options
    from mla_converters.support.memory import return_freed_memory

    quiet_transformers()
    return_freed_memory()
    for name, value, choices in (
        ("--method", method, Method),
        ("--rope-keep", rope_keep, Keep),
        ("--svd", svd, Svd),
        ("--layer-sizes", layer_sizes, LayerSizes),
    ):
        if value is not None:
            check_choice(name, value, choices)
    for ingredient in without or ():
        check_choice("--without", ingredient, Ingredient)
    if freqfold != "auto" and not freqfold.isdecimal():
        raise ConversionError(f"--freqfold is {freqfold!r}, but must be a whole number or auto.")
    options = Options(
        method=Method(method),
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        cache_ratio=cache_ratio,
        freqfold=None if freqfold == "auto" else int(freqfold),
        rope_keep=Keep(rope_keep) if rope_keep else None,
        svd=Svd(svd) if svd else None,
        refit_steps=refit_steps,
        layer_sizes=LayerSizes(layer_sizes),
        without=frozenset(map(Ingredient, without or ())),
        calibration=tuple(calibration or Options.calibration),
        calibration_tokens=calibration_tokens,
        seed=seed,
        dtype=dtype,
        device=chosen_device(device),
        max_context=max_context,
        trust_remote_code=trust_remote_code,
    )
    report = run(source, out, options, revision=revision, force=force, quiet=not Console(stderr=True).is_terminal)
    write_report(json_file, report)
    _print_report(report)
    if push_to_hub:
        update_card(out, repo=push_to_hub)
        print(f"Uploaded to {push(out, push_to_hub, private=not public)}")


def _print_report(report: dict) -> None:
    table = Table(title=f"{report['source']} as MLA ({report['method']})", show_header=False)
    cached = report["cached_per_token_and_layer"]
    bytes_each = 4 if report["dtype"] == "float32" else 2
    per_token = {who: round(n * report["layers"]) * bytes_each for who, n in cached.items()}
    rows = {
        "kv_lora_rank + qk_rope_head_dim": f"{report['kv_lora_rank']} + {report['qk_rope_head_dim']}",
        "KV cache per token": f"{per_token['source']:,} -> {per_token['mla']:,} bytes ({report['dtype']})",
        "Share of the source's cache": f"{report['cache_ratio']:.1%}",
        **({"FreqFold": str(report["freqfold"])} if "freqfold" in report else {}),
        "Weights": f"{report['weights_bytes'] / 1e6:,.0f} MB",
        "Took": f"{report['seconds']:.1f} s, {report['peak_rss_bytes'] / 1e9:.2f} GB peak memory",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out = Console()
    out.print(table)
    print_warnings(out, report.get("warnings", ()))
    out.print(f"Serve it: vllm serve {report['out']}", highlight=False, soft_wrap=True)
