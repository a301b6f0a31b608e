"""The table of families in ``docs/reference/supported-models.md``, from the families table and the last check."""

from pathlib import Path
from typing import Any

from vllm_mla_plugin.checkpoint.families import FAMILIES, Family

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "supported-models.md"
BEGIN, END = "<!-- families: python -m scripts.check_families -->\n", "<!-- end of families -->\n"
MODELS = {
    "llama": "Llama 2 and 3, and models of their architecture",
    "mistral": "Mistral 7B, within its sliding window",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 mixtures of experts",
    "mixtral": "Mixtral, within its sliding window",
    "arcee": "Arcee AFM",
    "seed_oss": "Seed-OSS",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "smollm3": "SmolLM3",
    "granite": "Granite 3",
    "olmo2": "OLMo-2",
    "phi3": "Phi-3 and Phi-4, except with LongRoPE",
    "glm4": "GLM-4-0414",
    "glm4_moe": "GLM-4.5, 4.6 and 4.7",
    "minimax_m2": "MiniMax-M2",
}


def traits(family: Family) -> str:
    """What differs from Llama, in words."""
    norms, biases = family.norms, family.biases
    words = [
        "mixture of experts" if family.experts else "",
        {"head": "QK-norm", "all": "QK-norm over all heads", None: ""}[family.qk_norm],
        "norms of outputs" if norms.after_attention else "",
        "fused projections" if family.fused_qkv else "",
        "partial rotary" if family.partial_rotary else "",
        "interleaved pairs" if family.interleaved else "",
        "biases" if True in biases else "",
    ]
    return ", ".join(word for word in words if word) or "none"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table.

    Args:
        rows: results of :mod:`scripts.check_families`, by ``model_type``.
    """
    lines = [
        "| source architecture | models | beside Llama's | largest difference in vLLM | checked |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES.values():
        row = rows.get(family.model_type, {})
        worst, date = (row.get(name, "not yet") for name in ("largest_difference_of_log_probabilities", "date"))
        models = MODELS[family.model_type]
        lines.append(f"| `{family.architecture}` | {models} | {traits(family)} | {worst} | {date} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, rows: dict[str, dict[str, Any]]) -> str:
    """The page with the table of these results."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def write_table(rows: dict[str, dict[str, Any]]) -> None:
    """Put the table into the page."""
    PAGE.write_text(with_table(PAGE.read_text(), rows))
