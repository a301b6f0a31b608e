"""``vllm-mla bench``: real engines side by side, figures of known runs, and refusals."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from support.commands import CommandLine, Refused, convert
from support.models import RandomModel
from support.packed import pack_checkpoint
from transformers import LlamaConfig

from mla_converters.bench import contenders, run
from mla_converters.bench.run import medians
from mla_converters.checkpoints.models import Model
from mla_converters.checkpoints.vllm_caches import VLLM_CACHES, WIDE_CPU
from mla_converters.engines.measuring import Step, decode_rate, peak_concurrency, spread
from mla_converters.options import BenchOptions
from mla_converters.options.bench import RIVALS
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.config import CONFIG_CLASSES
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json
from vllm_mla_plugin.checkpoint.layouts import A100, HOPPER

ENGINE = json.dumps({"enforce_eager": True})


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 256, and heads of 32, which vLLM's CPU attention accepts."""
    return RandomModel(head_dim=32).save(tmp_path_factory.mktemp("random") / "source")


@pytest.fixture
def refused(refusal: Refused) -> Refused:
    """Run a benchmark that must be refused; return the sentence that it prints."""
    return partial(refusal, "bench")


@pytest.mark.engine
def test_two_models(command_line: CommandLine, random_model: Path, tmp_path: Path) -> None:
    """The JSON and the table have every figure of every model and workload, and the picture is drawn."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    half = convert(random_model, tmp_path / "half", "--method", "transmla", "--cache-ratio", 0.5)
    report, picture = tmp_path / "report.json", tmp_path / "speed.png"
    options = ("--lengths", "16:48,32:1", "--requests", "1,3", "--rounds", 2, "--cache", "64MiB", "--engine", ENGINE)
    code, table, complaint = command_line("bench", random_model, half, *options, "--json", report, "--plot", picture)
    assert (code, complaint) == (0, ""), "noise beside the table"
    result = json.loads(report.read_text())
    rows = result["models"]
    workloads = [(row["requests"], row["input_len"], row["output_len"]) for row in rows]
    engines = 3 if contenders.this_device() == WIDE_CPU else 2  # CPUs with AVX-512 serve the source's fp8 cache
    assert workloads == [w for w in [(1, 16, 48), (1, 32, 1), (3, 16, 48), (3, 32, 1)] for _ in range(engines)]
    for row in rows:
        assert len(row["runs"]) == 2
        # A request of one token may end before the next one arrives.
        assert row["output_len"] == 1 or row["peak_concurrency"] == row["requests"]
        assert row["preemptions"] == 0
        tokens = row["requests"] * row["output_len"]
        assert [run["output_tokens_per_second"] * run["seconds"] for run in row["runs"]] == pytest.approx([tokens] * 2)
        assert 0 < row["time_to_first_token"]["median"] <= row["seconds"]
        if row["output_len"] == 1:
            assert "decode_tokens_per_second" not in row and "time_per_output_token" not in row
        else:
            assert row["decode_tokens_per_second"] > 0 and row["ratios"]["decode_tokens_per_second"] > 0
    source, *rivals, converted = rows[:engines]
    for rival in rivals:
        assert (rival["name"], rival["cache_format"]) == (f"{random_model}, fp8 cache", "fp8")
        assert rival["bytes_per_token_and_layer"] == 128 and "ratios_to_best" not in rival
        assert converted["ratios_to_best"]["kv_capacity"] == pytest.approx(1, rel=0.02), "half of the bytes, as in fp8"
    assert [note.split(" cache here: vLLM serves none for heads of 32 numbers")[0] for note in result["notes"]] == [
        f"{random_model} has no {name}" for name in ["fp8", "int4_per_token_head", "turboquant_4bit_nc"][engines - 2 :]
    ]
    assert all(note[:60] in table for note in result["notes"])
    assert source["ratios"]["output_tokens_per_second"] == source["ratios"]["time_to_first_token"] == 1
    assert (source["cached_per_token_and_layer"], converted["cached_per_token_and_layer"]) == (128, 64)
    assert {row["cache_format"] for row in (source, converted)} == {"bfloat16"}
    assert (source["bytes_per_token_and_layer"], converted["bytes_per_token_and_layer"]) == (256, 128)
    assert converted["ratios"]["kv_capacity"] == pytest.approx(2, rel=0.02)
    assert f"{converted['kv_capacity_tokens']:,}" in table
    assert result["command"].startswith("vllm-mla bench ") and result["hardware"]["cores"] >= 1
    assert {"vllm", "torch", "vllm-mla-plugin", "python"} == result["versions"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
@pytest.mark.parametrize("unpacked", [False, True])
def test_packed_cache(command_line: CommandLine, random_model: Path, tmp_path: Path, unpacked: bool) -> None:
    """The report has the cache's format and bytes as vLLM serves it, and vLLM's capacity follows from the bytes."""
    exact = convert(random_model, tmp_path / "exact", "--method", "exact")
    specs = ["64x4g32/64x8g64s/a4", "64x4g32/64x4g32/a4"]
    formats = [CacheFormat.parse(spec) for spec in specs]
    packed = pack_checkpoint(exact, tmp_path / "packed", formats, torch.arange(64)[None])
    engine = {"enforce_eager": True, **({"hf_overrides": {"latent_cache": None}} if unpacked else {})}
    options = ("--lengths", 16, "--requests", 1, "--rounds", 1, "--cache", "16MiB", "--engine", json.dumps(engine))
    report = tmp_path / "report.json"
    code, table, complaint = command_line("bench", packed, *options, "--json", report)
    assert (code, complaint) == (0, "")
    (row,) = json.loads(report.read_text())["models"]
    size = 256 if unpacked else (104 + 72) / 2
    assert row["cache_format"] == ("bfloat16" if unpacked else specs)
    assert row["bytes_per_token_and_layer"] == size
    assert row["bits_per_cached_number"] == size / 16
    assert row["kv_capacity_tokens"] == pytest.approx(2**24 / (2 * size), rel=0.02)
    assert ("bfloat16" if unpacked else "formats differ by layer") in table
    assert f"{size:.0f}" in table and f"{row['kv_capacity_tokens']:,}" in table


def test_caches_that_do_not_fit(command_line: CommandLine, random_model: Path) -> None:
    code, table, complaint = command_line("bench", random_model, "--lengths", 16, "--cache", "90000GiB")
    assert (code, table) == (2, "")
    assert "1 x 9e+04 GiB of cache do not fit into the " in complaint and "give a smaller --cache" in complaint


@pytest.mark.engine
def test_dummy_weights_need_no_weights(command_line: CommandLine, random_model: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text((random_model / "config.json").read_text())
    options = ("--lengths", 16, "--requests", "2,most", "--rounds", 1, "--cache", "2MiB", "--engine", ENGINE)
    report = tmp_path / "report.json"
    code, table, complaint = command_line("bench", shape, "--load-format", "dummy", *options, "--json", report)
    assert (code, complaint) == (0, "")
    assert "2 x 16 in, 16 out" in table and "most x 16 in, 16 out" in table
    result = json.loads(report.read_text())
    (engine,) = result["engines"].values()
    # Each request takes one block, and vLLM keeps one block empty.
    assert engine["kv_block_size"] >= 32
    most = engine["kv_capacity_tokens"] // engine["kv_block_size"] - 1
    two, full = result["models"]
    assert two["peak_concurrency"] == 2 < full["peak_concurrency"] == most
    assert full["preemptions"] == 0


@pytest.mark.engine
def test_preemptions(command_line: CommandLine, random_model: Path, tmp_path: Path) -> None:
    """They are counted in each round for itself, where answers outgrow the cache that their prompts fit into."""
    options = ("--lengths", "16:200", "--requests", "1,30", "--rounds", 2, "--cache", "2MiB", "--engine", ENGINE)
    report = tmp_path / "report.json"
    code, _, complaint = command_line("bench", random_model, "--load-format", "dummy", *options, "--json", report)
    assert (code, complaint) == (0, "")
    one, many = json.loads(report.read_text())["models"]
    assert one["preemptions"] == 0
    first, second = (run["preemptions"] for run in many["runs"])
    assert first == second > 0


def test_rivals() -> None:
    """What is measured on a device: the source in the formats that it serves, and conversions in all that they have."""
    source = Model("model", "model", LlamaConfig(num_attention_heads=4, hidden_size=256))
    shape = {"num_hidden_layers": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 64}
    packed = latent_cache_json([CacheFormat.parse("64x4g32/64x8g64s/a4")])
    plain, small = (
        Model(name, name, CONFIG_CLASSES["llama_mla"](**shape, **cache))
        for name, cache in (("plain", {}), ("small", {"latent_cache": packed}))
    )

    def measured(device: str, models: list[Model], **options: object) -> tuple[list[str], list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contenders, "this_device", lambda: device)
            found, notes = contenders.contenders(models, BenchOptions(**options))
        return [each.name for each in found], notes

    every = ["model", "model, fp8 cache", "model, int4_per_token_head cache", "model, turboquant_4bit_nc cache"]
    conversions = ["plain", "plain, fp8 cache", "small", "small, 16 bits", "small, fp8 cache"]
    assert measured(HOPPER, [source, plain, small]) == (every + conversions, [])
    assert measured(A100, [source, plain])[0] == [*every, "plain"], "by another backend, and the A100 has no fp8"
    names, notes = measured("CPU", [source, small])
    assert names == ["model", "small", "small, 16 bits"] and len(notes) == 3
    assert notes[0] == "model has no fp8 cache here: vLLM serves none for heads of 64 numbers on CPU."
    assert measured(HOPPER, [source, small], rivals="none") == (["model", "small"], [])
    assert measured(HOPPER, [source, small], engine={"kv_cache_dtype": "fp8"}) == (["model", "small"], [])
    assert measured(HOPPER, [source]) == (["model"], [])
    assert set(RIVALS) == {cache.name for cache in VLLM_CACHES}


@pytest.mark.engine
def test_rival_that_vllm_refuses(
    command_line: CommandLine, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are measured all the same, and vLLM's sentence is reported."""
    wrong = contenders.Contender(Model("rival", str(random_model), LlamaConfig()), "no cache", {"kv_cache_dtype": "no"})
    monkeypatch.setattr(run, "contenders", lambda models, options: ([contenders.Contender(models[0]), wrong], []))
    report = tmp_path / "report.json"
    options = ("--lengths", 16, "--requests", 1, "--rounds", 1, "--cache", "16MiB", "--engine", ENGINE)
    code, table, complaint = command_line("bench", random_model, *options, "--json", report)
    assert (code, complaint) == (0, "")
    result = json.loads(report.read_text())
    assert [row["name"] for row in result["models"]] == [str(random_model)]
    (note,) = result["notes"]
    assert note.startswith("vLLM cannot serve rival, no cache: ") and note[:30] in table


@pytest.mark.engine
def test_engine_that_fails(refused: Refused, random_model: Path) -> None:
    """vLLM's own message arrives in one sentence."""
    line = refused(random_model, "--lengths", 16, "--engine", '{"tensor_parallel_size": 3, "enforce_eager": true}')
    assert "vLLM cannot serve" in line


def test_figures_of_known_runs() -> None:
    assert peak_concurrency([(0, 2), (1, 3), (2, 4), (5, 6)]) == 2
    assert peak_concurrency([(0, 9), (1, 3), (2, 4)]) == 3
    assert spread([3.0]) == {"mean": 3, "median": 3, "p99": 3}
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3, "median": 2, "p99": pytest.approx(5.92)}
    steps = [Step(1, ["a"]), Step(2, ["a", "b"]), Step(2.5, ["a", "b"]), Step(2.9, ["b"])]
    assert decode_rate(steps, 2) == 4
    assert decode_rate(steps[:2], 2) is None, "the only step with both begins one of them"
    runs = [{"a": 1.0, "b": {"c": 2.0}, "d": None}, {"a": 3.0, "b": {"c": 2.0}, "d": 5.0}]
    assert medians(runs) == {"a": 2, "b": {"c": 2}, "d": 5}


OPTIONS = {
    "missing-model": (("/nowhere",), "/nowhere does not exist"),
    "lengths": (("--lengths", "16:x"), "--lengths has '16:x'"),
    "zero-length": (("--lengths", "0:5"), "--lengths must be at least 1"),
    "context": (("--lengths", "200:100"), "longer than the context"),
    "default-lengths": ((), "give --lengths that fit"),
    "requests": (("--requests", "many"), "must be numbers or most"),
    "no-requests": (("--requests", "0"), "1 or more"),
    "rivals": (("--rivals", "fp8,int3"), "--rivals has 'int3', but must be none or some of: fp8, "),
    "dtype": (("--dtype", "int8"), "choose one of auto"),
    "load-format": (("--load-format", "gguf"), "choose one of auto, dummy"),
    "cache": (("--cache", "much"), "--cache is 'much'"),
    "engine": (("--engine", "{"), "not valid JSON"),
    "engine-list": (("--engine", "[]"), "must be a JSON object"),
    "plot": (("--plot", "picture.jpg"), "must end in .png"),
    "json": (("--json", "/nowhere/report.json"), "not a file in an existing folder"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_refused_options(refused: Refused, case: str, random_model: Path) -> None:
    options, reason = OPTIONS[case]
    assert reason in refused(random_model, *options)
