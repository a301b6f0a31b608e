"""``vllm-mla plan``: sizes checked by hand for real shapes, recommendations, and refusals."""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine, Refused, contents, convert, vllm_mla
from support.download_hub import download_hub
from support.files import CALIBRATION
from support.models import MIXTRAL_EXPERTS, QWEN3_EXPERTS, RandomModel, load

from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.shape import read_source
from mla_converters.convert import convert as convert_here
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.methods.cost import written_bytes
from mla_converters.options import AttentionAwareOptions, CacheSizes, ConvertOptions, ExactOptions, PlanTraining
from mla_converters.options.common import Train
from mla_converters.planning.layouts import asked
from mla_converters.planning.training import LORA_RANK, planned_training
from mla_converters.training.trained import make_trainable, trained_parameters
from mla_converters.training.writing import disk_bytes
from vllm_mla_plugin.checkpoint.layouts import A100, BLACKWELL, GPUS, HOPPER, OTHER_GPU, PLUGIN_BACKEND

GIB = 2**30
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "llama-3-70b": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "llama-2-7b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}

Planner = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(command_line: CommandLine, tmp_path: Path) -> Planner:
    """Run ``vllm-mla plan --json`` in this process; return the plan."""

    def run(source: object, *options: object) -> dict[str, Any]:
        out = tmp_path / "plan.json"
        code, _, complaint = command_line("plan", source, *options, "--json", out)
        assert code == 0, complaint
        return json.loads(out.read_text())

    return run


@pytest.fixture
def refused(refusal: Refused) -> Refused:
    """Run a plan that must be refused; return the sentence that it prints."""
    return partial(refusal, "plan")


def write_config(folder: Path, shape: str = "llama-3-8b", **changes: Any) -> Path:
    """A folder that holds only ``config.json``."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | SHAPES[shape] | changes))
    return folder


def layout(plan: dict[str, Any], options: str) -> dict[str, Any]:
    """The candidate with these options of ``convert``."""
    (found,) = [x for x in plan["layouts"] if x["options"] == options.split()]
    return found


DEEPSEEK = "--kv-lora-rank 512 --qk-rope-head-dim 64"
SMALL = "--kv-lora-rank 256 --qk-rope-head-dim 64"
QUARTER = ["--cache-ratio", "0.25"]


def ways(plan: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """By options of the cache and way to share the work: bytes of a token on each GPU, and tokens on all."""
    return {
        (" ".join(way["options"]), way["way"]): (way["kv_bytes_per_token"], way["tokens"])
        for way in plan["gpus"]["ways"]
    }


def test_many_gpus(planned: Planner, tmp_path: Path) -> None:
    """A latent is whole on every GPU of a tensor-parallel group, unless these share out the tokens."""
    source = write_config(tmp_path / "Llama-3-8B")
    plan = planned(source, "--memory", "32GiB", "--tensor-parallel", 4)
    memory, found = 32 * GIB, ways(plan)
    assert found["", "tensor parallel"] == (32_768, memory // 32_768)  # 2 of 8 KV heads
    assert found["--kv-cache-dtype fp8", "tensor parallel"][0] == 16_384
    assert found[DEEPSEEK, "tensor parallel"] == (36_864, memory // 36_864)  # 112% of the source's
    assert found[DEEPSEEK, "decode context parallel"] == (9_216, memory // 9_216)
    left = memory - 16_060_522_496 * 3 // 4  # the quarter of the weights that tensor parallel leaves becomes the whole
    assert found["", "data-parallel attention"] == (131_072, 4 * (left // 131_072))
    assert ("", "decode context parallel") not in found, "no two GPUs keep the same KV head"
    assert ("--cache-ratio 0.25", "decode context parallel") not in found, "refused for packed rows"
    best = max(plan["gpus"]["ways"], key=lambda way: way["tokens"])
    assert best["options"] == ["--kv-cache-dtype", "int4_per_token_head"] and best["way"] == "tensor parallel"
    recommended = plan["gpus"]["recommended"]
    assert recommended.startswith("On 4 GPUs, convert nothing for the sake of memory, because the source (")
    assert f"{best['tokens']:,} tokens, " in recommended

    more = planned(source, "--memory", "32GiB", "--tensor-parallel", 16)["gpus"]
    shares = {(" ".join(way["options"]), way["way"]): way for way in more["ways"]}
    assert shares["", "decode context parallel"]["serve_options"][-1] == "2", "two GPUs keep the same KV head"
    assert shares["", "decode context parallel"]["kv_bytes_per_token"] == 131_072 / 16
    assert shares[DEEPSEEK, "decode context parallel"]["kv_bytes_per_token"] == 36_864 / 16
    serve = "--tensor-parallel-size 16 --decode-context-parallel-size 16"
    assert more["recommended"].startswith(f"On 16 GPUs, the conversion ({DEEPSEEK}) with {serve} holds most: ")


def test_many_gpus_share_experts(planned: Planner, command_line: CommandLine, tmp_path: Path) -> None:
    """Experts are shared out in every way. vLLM cannot share three KV heads between two GPUs, but a latent it can."""
    model = RandomModel("qwen3_moe", heads=6, kv_heads=3, head_dim=32, hidden=192, experts=QWEN3_EXPERTS)
    source = model.save(tmp_path / "source")
    shape = read_source(str(source)).shape
    assert 0 < shape.expert_parameters < shape.parameters
    found = ways(planned(source, "--memory", "1GiB", "--tensor-parallel", 2))
    assert ("", "tensor parallel") not in found and ("--cache-ratio 0.25", "tensor parallel") in found
    shared = 4 * (shape.parameters - shape.expert_parameters) // 2
    assert found["", "data-parallel attention"][1] == 2 * ((GIB - shared) // found["", "data-parallel attention"][0])
    code, table, _ = command_line("plan", source, "--tensor-parallel", 2, "--memory", "1GiB")
    assert code == 0 and "2 GPUs with 1GiB each" in table and "--data-parallel-size 2" in " ".join(table.split())


def test_llama_3_8b(planned: Planner, tmp_path: Path) -> None:
    plan = planned(write_config(tmp_path / "Llama-3-8B"), "--memory", "16GiB")
    source = plan["source"]
    assert source["parameters"] == 8_030_261_248
    assert source["weights_bytes"] == 16_060_522_496
    assert source["cached_per_token_and_layer"] == 2 * 8 * 128
    assert source["kv_bytes_per_token"] == 131_072  # 2,048 numbers * 32 layers * 2 bytes
    assert source["tokens_in_memory"] == 131_072  # 2**34 / 2**17
    deepseek = layout(plan, DEEPSEEK)
    assert (deepseek["bits_per_number"], deepseek["typical"]) == (16, False)
    assert deepseek["kv_bytes_per_token"] == 36_864  # 576 * 32 * 2
    assert deepseek["cache_ratio"] == 0.28125  # 576 / 2,048
    assert deepseek["tokens_in_memory"] == 466_033  # 2**34 // 36,864
    quarter = layout(plan, "--cache-ratio 0.25")
    assert quarter["bytes_per_token_and_layer"] == 1024  # a quarter of 2,048 numbers of 2 bytes
    assert quarter["kv_bytes_per_token"] == 32_768
    assert (quarter["bits_per_number"], quarter["typical"], quarter["cache_ratio"]) == (4, True, 0.25)
    latent, rope = quarter["kv_lora_rank"], quarter["qk_rope_head_dim"]
    assert rope == 128
    # q_proj, the map to rotary queries, kv_a_proj and kv_b_proj replace q, k and v of 6144 * 4096. Each layer gets 64
    # float32 frequencies.
    more = 32 * 128 * (4096 + rope) + (latent + rope) * 4096 + 32 * 256 * latent - 6144 * 4096
    assert plan["conversion"]["weights_bytes"] == 2 * (8_030_261_248 + 32 * more) + 32 * 64 * 4
    assert plan["recommended"]["options"] == QUARTER and plan["recommended"]["cache_ratio"] == 0.25
    assert plan["warnings"] == []


def test_what_vllm_does_without_a_conversion(planned: Planner, tmp_path: Path) -> None:
    """The plan counts vLLM's own formats, and advises to convert nothing where they are small enough."""
    folder = write_config(tmp_path / "Llama-3-8B")
    plan = planned(folder, "--memory", "16GiB")
    sizes = {x["kv_cache_dtype"]: (x["kv_bytes_per_token"], x["cache_ratio"]) for x in plan["vllm_caches"]}
    assert sizes["fp8"] == (65_536, 0.5)
    assert sizes["int4_per_token_head"] == (32 * 8 * 2 * (64 + 4), 0.265625)
    fp8 = next(x for x in plan["vllm_caches"] if x["kv_cache_dtype"] == "fp8")
    assert fp8["tokens_in_memory"] == 262_144 and fp8["served_on"][1:] == list(GPUS)
    half, int4, exact, quarter = plan["advice"]
    assert half["command"] == f"vllm serve {folder} --kv-cache-dtype fp8"
    assert int4["command"] == f"vllm serve {folder} --kv-cache-dtype int4_per_token_head"
    assert exact["command"] == f"vllm-mla convert {folder} ./Llama-3-8B-mla --method exact --latent-bits 4"
    assert quarter["command"] == plan["command"]
    assert [x["cache_ratio"] for x in plan["advice"]] == [0.5, 0.265625, 0.28125, 0.25]


def test_llama_3_70b(planned: Planner, tmp_path: Path) -> None:
    plan = planned(write_config(tmp_path / "Llama-3-70B", "llama-3-70b"), "--memory", "80GB")
    assert plan["source"]["parameters"] == 70_553_706_496
    assert plan["source"]["kv_bytes_per_token"] == 327_680  # 2,048 * 80 * 2
    assert plan["source"]["tokens_in_memory"] == 244_140  # 80e9 // 327,680
    assert layout(plan, DEEPSEEK)["kv_bytes_per_token"] == 92_160
    assert plan["recommended"]["options"] == QUARTER
    # To write its own calibration text, the model must be in memory as a whole.
    assert plan["conversion"]["peak_memory_bytes"]["self"] > 2 * 70_553_706_496
    assert plan["conversion"]["peak_memory_bytes"]["file"] < 16e9


def test_llama_2_7b(planned: Planner, tmp_path: Path) -> None:
    """32 KV heads: 512 + 64 in 16 bits is 7% of the bytes. A search keeps the widest latent that GPUs serve."""
    plan = planned(write_config(tmp_path / "Llama-2-7B", "llama-2-7b"))
    assert plan["source"]["parameters"] == 6_738_415_616
    assert plan["source"]["kv_bytes_per_token"] == 524_288
    assert layout(plan, DEEPSEEK)["cache_ratio"] == 0.070312  # 576 / 8,192, to six digits
    quarter = layout(plan, "--cache-ratio 0.25")
    assert (quarter["kv_lora_rank"], quarter["qk_rope_head_dim"], quarter["bits_per_number"]) == (2048, 128, 8)
    assert quarter["cache_ratio"] == plan["recommended"]["cache_ratio"] == pytest.approx(2210 / 16384, abs=0.001)
    assert list(quarter["backends"]) == ["CPU", HOPPER, BLACKWELL, A100]
    assert f"on some GPUs ({HOPPER}, {BLACKWELL}, {A100}) {PLUGIN_BACKEND}" in plan["recommended"]["reason"]
    assert plan["command"].endswith("Llama-2-7B ./Llama-2-7B-mla --cache-ratio 0.25")


def test_smollm2(planned: Planner, smollm2: Path) -> None:
    plan = planned(smollm2, "--memory", "1GiB")
    source = plan["source"]
    assert (source["parameters"], source["weights_bytes"]) == (134_515_008, 4 * 134_515_008)
    assert (source["dtype"], source["cache_dtype"]) == ("float32", "bfloat16")  # as vLLM serves it by default
    assert source["kv_bytes_per_token"] == 23_040  # 384 * 30 * 2
    assert source["tokens_in_memory"] == 46_603
    rows = {" ".join(x["options"]): x["bytes_per_token_and_layer"] for x in plan["layouts"]}
    assert rows == {
        SMALL: 640,
        "--method exact --latent-bits 8": 392,
        "--cache-ratio 0.5": 384,
        "--cache-ratio 0.3125": 240,
        "--method exact --latent-bits 4": 216,
        "--cache-ratio 0.25": 192,
        "--cache-ratio 0.1875": 144,
        "--cache-ratio 0.125": 96,
        "--cache-ratio 0.0625": 48,
    }
    assert plan["recommended"]["options"] == QUARTER
    assert plan["command"].endswith(" --cache-ratio 0.25")


def test_other_methods(planned: Planner, smollm2: Path) -> None:
    """The recommended command has the options with which the method gives a quarter of the bytes."""
    for options, expected in (
        ("--method exact", "--method exact --latent-bits 4"),
        ("--method transmla", "--method transmla --cache-ratio 0.25 --latent-bits 4"),
        ("--layer-sizes measured", "--layer-sizes measured --cache-ratio 0.25 --latent-bits 16"),
    ):
        assert planned(smollm2, *options.split())["command"].endswith(f"-mla {expected}")


def test_weights_are_those_of_a_conversion(planned: Planner, smollm2: Path) -> None:
    """The bytes are exactly those that ``convert`` wrote for SmolLM2 at 128 + 64."""
    assert written_bytes(read_source(str(smollm2)).shape, CacheBudget(128, 64), nope_dim=64) == 546_911_232


@pytest.mark.parametrize(
    "model",
    [
        RandomModel("qwen3", heads=6, kv_heads=3, hidden=96),
        RandomModel("qwen3_moe", layers=3, experts=QWEN3_EXPERTS),
        RandomModel("mixtral", tied=True, experts=MIXTRAL_EXPERTS),
    ],
    ids=lambda model: model.family,
)
def test_weights_of_every_kind_of_family(model: RandomModel, tmp_path: Path) -> None:
    """With QK-norm, and with experts, the plan's bytes are those that ``convert`` writes."""
    source = model.save(tmp_path / "source")
    out, report = tmp_path / "mla", tmp_path / "report.json"
    options = ("--kv-lora-rank", 20, "--qk-rope-head-dim", 10, "--refit-steps", 0)
    convert(source, out, *options, "--calibration", CALIBRATION, "--calibration-tokens", 2048, "--json", report)
    shape = read_source(str(source)).shape
    planned_bytes = written_bytes(shape, CacheBudget(20, 10), shape.head_dim)
    assert planned_bytes == json.loads(report.read_text())["weights_bytes"]


def test_backends(planned: Planner, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    plan = planned(folder)
    assert layout(plan, DEEPSEEK)["backends"] == {
        "CPU": ["any-size backend of this plugin"],
        HOPPER: ["FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA"],
        BLACKWELL: ["FLASHINFER_MLA", "CUTLASS_MLA", "TRITON_MLA"],
        A100: ["TRITON_MLA"],
        OTHER_GPU: ["TRITON_MLA"],
    }
    assert layout(plan, SMALL)["backends"][HOPPER] == ["FLASH_ATTN_MLA", "TRITON_MLA"]
    assert set(layout(plan, "--cache-ratio 0.125")["backends"]) == {"CPU", *GPUS}
    # Packed caches are served by this plugin alone.
    for candidate in plan["layouts"]:
        if candidate["bits_per_number"] != 16:
            assert all(names == [PLUGIN_BACKEND] for gpu, names in candidate["backends"].items() if gpu in GPUS)
    # GPU backends take models in 16 bits only.
    in_float32 = planned(folder, "--dtype", "float32")
    assert not any(set(x["backends"]) & set(GPUS) for x in in_float32["layouts"])
    assert "GPUs do not serve MLA in float32" in in_float32["recommended"]["reason"]
    assert " --cache-ratio 0.25" in in_float32["command"]
    # Numbers that are not packed take 4 bytes then, but packed rows stay as they are.
    assert in_float32["source"]["kv_bytes_per_token"] == 2 * 131_072
    assert layout(in_float32, DEEPSEEK)["kv_bytes_per_token"] == 2 * 36_864
    assert layout(in_float32, "--cache-ratio 0.25") == layout(plan, "--cache-ratio 0.25") | {
        "backends": {"CPU": ["any-size backend of this plugin"]}
    }


def test_table(command_line: CommandLine, tmp_path: Path) -> None:
    """The table for people shows the numbers, and ends with the command on its own line."""
    folder = write_config(tmp_path / "my model")
    _, output, _ = command_line("plan", folder, "--calibration-tokens", 4096)
    for text in (
        *("131,072 bytes (bfloat16)", "8.03 billion parameters", "turboquant_3bit_nc", "36,864", "32,768", "28.1%"),
        *("~4", "CPU, GPU", "some GPUs", "--cache-ratio 0.25", "FLASHMLA", "vllm serve", "convert nothing"),
    ):
        assert text in output
    assert PLUGIN_BACKEND in " ".join(output.split())
    assert shlex.split(output.splitlines()[-1]) == [
        *("vllm-mla", "convert", str(folder), "./my model-mla"),
        *(*QUARTER, "--calibration-tokens", "4096"),
    ]


def test_bare_config_file(planned: Planner, tmp_path: Path) -> None:
    """The command names the folder, because ``convert`` takes a folder."""
    folder = write_config(tmp_path / "model")
    assert planned(folder / "config.json") == planned(folder)


def test_hub_id(tmp_path: Path) -> None:
    """No weights are fetched."""
    report = tmp_path / "plan.json"
    with download_hub() as hub:
        hub.files = contents(write_config(tmp_path / "model")) | {"model.safetensors": b"", "tokenizer.json": b"{}"}
        command = ("plan", "lab/tiny", "--revision", "main", "--json", report)
        result = vllm_mla(*command, environment=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert hub.fetched == {"config.json"}
    plan = json.loads(report.read_text())
    assert plan["command"].startswith("vllm-mla convert lab/tiny ./tiny-mla ")
    assert plan["command"].endswith(" --revision main")


def test_sliding_window(planned: Planner, tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
    plan = planned(write_config(tmp_path / "mistral", **mistral))
    (warning,) = plan["warnings"]
    assert "sliding window of 4096 tokens" in warning and "--max-context 4096" in warning
    assert "--max-context 4096" in plan["command"]


def test_cost_grows_with_what_it_should(planned: Planner, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    few, many = (planned(folder, "--calibration-tokens", n)["conversion"] for n in (16384, 32768))
    assert AttentionAwareOptions.name in many["core_seconds"]
    for method, seconds in many["core_seconds"].items():
        # An exact conversion needs no text.
        assert seconds > few["core_seconds"][method] or (method == "exact" and seconds == few["core_seconds"][method])
    assert many["sampling_core_seconds"] == pytest.approx(2 * few["sampling_core_seconds"], abs=1)
    # Two streams of hidden states have 4,096 float32 numbers per token. The random tokens are the same in both plans.
    assert many["peak_memory_bytes"]["file"] - few["peak_memory_bytes"]["file"] == 2 * 16384 * 4096 * 4
    assert many["weights_bytes"] == few["weights_bytes"]


def test_refused_sources(refused: Refused, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "neither a folder here nor a model" in refused("someone/some-model")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is not a readable GGUF file" in refused(tmp_path / "model.gguf")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refused(tmp_path / "config.json")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "is not supported; supported are"),
    "mla": ({"kv_lora_rank": 512}, "uses MLA already"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised (bitsandbytes)"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
    "uneven": ({"num_key_value_heads": 5}, "config.json is wrong"),
    "type": ({"hidden_size": "big"}, "not a valid configuration"),
    "no-heads": ({"num_key_value_heads": 0}, "num_key_value_heads 0, where a number from 1"),
    "no-layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0, where a number from 1"),
    "dtype": ({"torch_dtype": "int8"}, "says dtype 'int8'"),
    "activation": ({"hidden_act": "nonsense"}, "not a valid configuration"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_configs(refused: Refused, case: str, tmp_path: Path) -> None:
    changes, reason = CONFIGS[case]
    assert reason in refused(write_config(tmp_path / "model", **changes))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--memory", "lots"), "--memory is 'lots'"),
        (("--memory", "16"), "16GiB or 80GB"),
        (("--memory", "0GiB"), "--memory is '0GiB'"),
        (("--dtype", "int4"), "--dtype is 'int4'; choose one of float32, bfloat16, float16"),
        (("--calibration-tokens", "0"), "--calibration-tokens is 0"),
        (("--json", "/nowhere/plan.json"), "--json is /nowhere/plan.json, which is not a file in an existing folder"),
    ],
)
def test_refused_options(refused: Refused, tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    assert reason in refused(write_config(tmp_path / "model"), *options)


@pytest.mark.parametrize(
    ("text", "expected"), [("16GiB", 16 * GIB), ("80GB", 80 * 10**9), ("1.5 gib", 3 * GIB // 2), ("512MiB", GIB // 2)]
)
def test_memory(text: str, expected: int) -> None:
    from mla_converters.options import parse_memory

    assert parse_memory(text) == expected


def test_refit_costs_time_and_memory(planned: Planner, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    closed_form, refitted = (planned(folder, "--refit-steps", n) for n in (0, 96))
    assert "--refit-steps 0" in closed_form["command"] and "--refit-steps" not in refitted["command"]
    few, many = closed_form["conversion"], refitted["conversion"]
    assert few["core_seconds"][AttentionAwareOptions.name] < many["core_seconds"][AttentionAwareOptions.name]
    assert few["core_seconds"]["transmla"] == many["core_seconds"]["transmla"]
    assert few["peak_memory_bytes"]["file"] < many["peak_memory_bytes"]["file"]
    # The converted model's hidden states add 4,096 float32 numbers per token, twice while a new copy is written.
    assert many["peak_disk_bytes"] - few["peak_disk_bytes"] == 2 * 16384 * 4096 * 4


def test_least_squares_cost_where_they_are_fitted(planned: Planner, tmp_path: Path) -> None:
    """The fit needs 8 tokens for each of the 4,096 numbers that heads read; 2,048 of the tokens are random. With
    it, the converted model's hidden states pass through the layers too."""
    folder = write_config(tmp_path / "model")
    plans = [planned(folder, "--refit-steps", 0, "--calibration-tokens", tokens) for tokens in (30_719, 30_720)]
    assert "--calibration-tokens 30720 " in plans[0]["warnings"][0]
    assert plans[1]["warnings"] == []
    few, many = (plan["conversion"] for plan in plans)
    assert many["peak_disk_bytes"] - few["peak_disk_bytes"] == pytest.approx(2 * 30_720 * 4096 * 4, rel=1e-3)
    assert many["core_seconds"][AttentionAwareOptions.name] > 1.2 * few["core_seconds"][AttentionAwareOptions.name]
    assert many["core_seconds"]["transmla"] == pytest.approx(few["core_seconds"]["transmla"], rel=1e-3)


def test_training(planned: Planner, tmp_path: Path) -> None:
    """Sizes checked by hand for a model of 8 billion parameters."""
    folder = write_config(tmp_path / "model")
    assert "training" not in planned(folder)
    one, eight, whole = (
        planned(folder, "--heal", *options)["training"]
        for options in ((), ("--devices", 8), ("--devices", 8, "--train", "all", "--gradient-checkpointing"))
    )
    assert one["train"] == "attention" and not one["measured"]
    # The source takes 16 GB in 16 bits, and 16 bytes come for each trained weight.
    assert one["memory_bytes"] > 16e9 + 16 * one["trained_parameters"]
    assert eight["memory_bytes"] == one["memory_bytes"]
    assert one["memory_bytes"] / 8 < eight["sharded_memory_bytes"] < one["memory_bytes"] / 2
    assert eight["hours"] == pytest.approx(one["hours"] / 8, rel=0.02)
    assert whole["trained_parameters"] > 8e9 > 3 * one["trained_parameters"]
    assert whole["disk_bytes"] > 24 * 8e9
    measured = planned(
        RandomModel().save(tmp_path / "small"), "--heal", "--measure", "--length", 64, "--device", "cpu"
    )["training"]
    assert measured["measured"] and measured["tokens_per_second_and_device"] > 0


WIDTHS = {"kv_lora_rank": 20, "qk_rope_head_dim": 12}
TRAINED = {
    "mapped": (RandomModel(bias=True), AttentionAwareOptions(refit_steps=0), CacheSizes(**WIDTHS)),
    "qk-norm": (RandomModel("qwen3"), AttentionAwareOptions(refit_steps=0), CacheSizes(**WIDTHS)),
    "not-mapped": (RandomModel(kv_heads=1), ExactOptions(), CacheSizes()),
}


@pytest.mark.parametrize("case", TRAINED)
def test_trained_weights(case: str, tmp_path: Path) -> None:
    """They are counted as they are made trainable, and so are the checkpoints' bytes before a training begins."""
    pytest.importorskip("peft")
    source, method, sizes = TRAINED[case]
    text = {} if method.name == "exact" else {"calibration": (str(CALIBRATION),), "calibration_tokens": 1024}
    options = ConvertOptions(method=method, **text, **dict(sizes))
    model = tmp_path / "mla"
    convert_here(str(source.save(tmp_path / "source")), model, options, quiet=True)
    described = read_source(str(tmp_path / "source"))
    chosen, memory = asked(described.shape, method, sizes), {}
    choices: tuple[Train, ...] = ("attention", "lora", "all")
    for choice in choices:
        network = load(model)
        make_trainable(network, choice, LORA_RANK, seed=0)
        trained = sum(weight.numel() for weight in trained_parameters(network))
        planned = planned_training(described, chosen, PlanTraining(train=choice, tokens=1))
        assert planned.trained_parameters == pytest.approx(trained, rel=0 if choice == "lora" else 0.01)
        disk = disk_bytes(Checkpoint(model), choice, LORA_RANK, planned.tokens)
        assert planned.disk_bytes == pytest.approx(disk, rel=0.01)
        memory[choice] = planned.memory_bytes
    assert memory["lora"] < memory["attention"] < memory["all"]
