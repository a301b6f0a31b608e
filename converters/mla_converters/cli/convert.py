"""``vllm-mla convert``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla_converters.cli.common import (
    Force,
    NewFolder,
    ReportFile,
    check_output,
    loss_rows,
    print_next,
    print_warnings,
    publish,
    quiet_transformers,
)
from mla_converters.cli.flags import with_flags
from mla_converters.errors import OptionError
from mla_converters.options import ConvertOptions
from mla_converters.reports.conversion import ConversionReport, SelfCheck

EPILOG = """
**Examples**

A quarter of the cache's bytes, calibrated on text the model writes itself:

`vllm-mla convert HuggingFaceTB/SmolLM2-135M-Instruct ./smol-mla`

DeepSeek's sizes, which have the fastest GPU kernels, calibrated on your text and on the model's own:

`vllm-mla convert ./Llama-3.1-8B ./llama-mla --kv-lora-rank 512 --qk-rope-head-dim 64 --calibration my.txt
--calibration self`

**Next**: `vllm serve OUT`
"""


@with_flags(ConvertOptions)
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or .gguf file.")],
    out: NewFolder,
    options: ConvertOptions,
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
        raise OptionError("--public is about --push-to-hub: give both.")
    # Imported here, not above: `--help` should not wait for torch, nor every command for the hub's client.
    from mla_converters.checkpoints.hub import check_push, push

    if push_to_hub:
        check_push(push_to_hub)
    from mla_converters.cards.card import update_card
    from mla_converters.convert import convert as run
    from mla_converters.support.memory import return_freed_memory

    quiet_transformers()
    return_freed_memory()
    report = run(source, out, options, force=force)
    publish(report, _print_report, json_file)
    if push_to_hub:
        update_card(out, repo=push_to_hub)
        print(f"Uploaded to {push(out, push_to_hub, private=not public)}")


def _print_report(report: ConversionReport) -> None:
    table = Table(title=f"{report.source} as MLA ({report.method})", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "kv_lora_rank + qk_rope_head_dim": f"{report.kv_lora_rank} + {report.qk_rope_head_dim}",
        **({"Cache format": str(report.latent_cache)} if report.latent_cache else {}),
        "KV cache per token": _bytes_per_token(report),
        "Share of the source's cache": f"{report.cache_ratio:.1%}",
        **{name: str(value) for name, value in report.settings.items() if value != []},
        **({"Self-check": _self_check(report.self_check)} if report.self_check else {}),
        **loss_rows(report),
        **({"Keys not understood": ", ".join(report.unknown_keys)} if report.unknown_keys else {}),
        "Weights": f"{report.weights_bytes / 1e6:,.0f} MB",
        "Took": f"{report.seconds:.1f} s, {(report.peak_rss_bytes or 0) / 1e9:.2f} GB peak memory",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out = Console()
    out.print(table)
    print_warnings(out, report.warnings)
    print_next(out, report)


def _bytes_per_token(report: ConversionReport) -> str:
    """Bytes of both caches over all layers."""
    source, mla = report.cache_bytes
    return f"{source:,} -> {mla:,} bytes ({'the source at ' if report.latent_cache else ''}16 bits)"


def _self_check(check: SelfCheck) -> str:
    """The proof's numbers in a line."""
    agreement = f"likeliest token the source's for {check.top1_agreement:.0%} of {check.tokens} tokens"
    return f"{agreement}, KL {check.kl:.4f}"
