"""``vllm-mla convert``: the inputs that it accepts and refuses, and the files that it leaves."""

import hashlib
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import HALF, UNPACKED, CommandLine, Refused, convert, convert_alone, vllm_mla
from support.files import CALIBRATION, ROOT
from support.models import RandomModel
from tokenizers import Tokenizer, models, pre_tokenizers

from mla_converters.options import ConvertOptions
from mla_converters.options import command_line as command_of
from mla_converters.planning.plan import plan


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel(heads=6, kv_heads=3, hidden=96).save(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A model that can be converted (6 heads, 3 KV heads of 16). A test may damage it."""
    return Path(shutil.copytree(pristine, tmp_path / "source"))


@pytest.fixture
def refused(refusal: Refused, tmp_path: Path) -> Refused:
    """Run a conversion that must be refused and leave no files; return the sentence that it prints."""

    def run(source: object, *options: object) -> str:
        before = sorted(tmp_path.iterdir())
        line = refusal("convert", source, tmp_path / "out", *options)
        assert sorted(tmp_path.iterdir()) == before, "something was left behind"
        return line

    return run


def edit_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def test_refusal_as_users_see_it(tmp_path: Path) -> None:
    """The installed command gives exit code 2 and one line, without a traceback."""
    result = vllm_mla("convert", tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert result.stderr == f"vllm-mla: error: {tmp_path / 'nowhere'} does not exist.\n"


def test_no_such_source(refused: Refused, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "neither a folder here nor a model" in refused("someone/some-model")


def test_not_a_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (tmp_path / "file.txt").write_text("hello")
    assert "not a .gguf" in refused(tmp_path / "file.txt")
    (tmp_path / "file.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "is not a readable GGUF file" in refused(tmp_path / "file.gguf")


CONFIGS = {
    "unknown": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        "supported are: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
    ),
    "mla": ({"kv_lora_rank": 512}, "uses MLA already"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised (bitsandbytes)"),
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "RoPE type 'dynamic' cannot be converted",
    ),
    "longrope": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            }
        },
        "RoPE type 'longrope' cannot be converted",
    ),
    "architectures": ({"architectures": {"name": "LlamaForCausalLM"}}, "where a list of names was expected"),
    "heads": ({"num_key_value_heads": 4}, "config.json is wrong"),
    "layers": ({"num_hidden_layers": 3}, "model.layers.2.mlp.gate_proj.weight is missing"),
    "fewer-layers": ({"num_hidden_layers": 1}, "is no part of the architecture"),
    "type": ({"hidden_size": "big"}, "not a valid configuration"),
}


# The entries that matter here, from the models' own config.json.
KINDS = {
    "DeepseekV3ForCausalLM": ({"kv_lora_rank": 512}, "uses MLA already"),
    "T5ForConditionalGeneration": ({"is_encoder_decoder": True}, "is an encoder-decoder"),
    "Qwen2VLForConditionalGeneration": ({"vision_config": {"depth": 32}}, "reads more than text"),
    "Gemma2ForCausalLM": ({"attn_logit_softcapping": 50.0}, "caps attention scores"),
    "GptOssForCausalLM": ({"model_type": "gpt_oss"}, "has attention sinks"),
    "BloomForCausalLM": ({"model_type": "bloom"}, "has ALiBi instead of RoPE"),
    "MPTForCausalLM": ({"attn_config": {"alibi": True}}, "has ALiBi instead of RoPE"),
    "JambaForCausalLM": ({"mamba_d_state": 16}, "hybrid"),
    "Qwen3NextForCausalLM": ({"linear_num_key_heads": 16}, "hybrid"),
}


@pytest.mark.parametrize("architecture", KINDS)
def test_refused_kinds(refused: Refused, architecture: str, source: Path) -> None:
    """The refusal names the feature that MLA cannot represent, in every family."""
    fields, reason = KINDS[architecture]
    edit_config(source, architectures=[architecture], **fields)
    line = refused(source)
    assert architecture in line and reason in line


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_configs(refused: Refused, case: str, source: Path, tmp_path: Path) -> None:
    changes, reason = CONFIGS[case]
    edit_config(source, **changes)
    assert reason in refused(source, "--method", "exact")


def test_sliding_window(refused: Refused, tmp_path: Path) -> None:
    """An active window is refused. With a context up to the window, the conversion writes that limit."""
    source = RandomModel("mistral", window=64).save(tmp_path / "mistral")
    assert "--max-context 64" in refused(source, "--method", "exact")
    assert "sliding window of 64" in refused(source, "--method", "exact", "--max-context", 65)
    assert "must be 1 to the source's 256" in refused(source, "--method", "exact", "--max-context", 257)
    out = convert(source, tmp_path / "mla", "--method", "exact", "--max-context", 64)
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 64 and config["sliding_window"] is None
    inactive = RandomModel("mistral", window=256).save(tmp_path / "inactive")
    convert(inactive, tmp_path / "mla-256", "--method", "exact")


def test_config_that_is_no_json(refused: Refused, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(source)


TRANSMLA = ("--method", "transmla")
OPTIONS = {
    "seed": (("--seed", 2**64), "must fit 64 bits"),
    "rank": (("--qk-rope-head-dim", 16, "--kv-lora-rank", 81), "--kv-lora-rank can be 1 to 80"),
    "rank-zero": (("--kv-lora-rank", 0), "can be 1 to"),
    "odd-rope": (("--qk-rope-head-dim", 15), "must be even, at least 2 and at most 48"),
    "large-rope": (("--qk-rope-head-dim", 50), "must be even, at least 2 and at most 48"),
    "freqfold": ((*TRANSMLA, "--qk-rope-head-dim", 16, "--freqfold", 3), "choose one of 1, 2, 4, 8"),
    "freqfold-method": (("--freqfold", 2), "--freqfold is an option of --method transmla, not of attention-aware"),
    "svd": (("--method", "mha2mla", "--svd", "both"), "choose one of joint, split"),
    "rope-keep-method": (("--rope-keep", "low"), "--rope-keep is an option of --method mha2mla"),
    "without": (("--without", "magic"), "choose one of mean-phase, attention-weights"),
    "without-least-squares": (("--without", "least-squares"), "changes only the closed form"),
    "without-fit": (
        ("--without", "converted-inputs", "--without", "least-squares", "--refit-steps", 0),
        "changes only least squares and the refit",
    ),
    "without-mlp": (("--without", "mlp", "--refit-steps", 0), "changes only the refit"),
    "without-method": ((*TRANSMLA, "--without", "search"), "an option of --method attention-aware"),
    "refit-steps": (("--refit-steps", -1), "must be 0 or more"),
    "freqfold-word": ((*TRANSMLA, "--freqfold", "many"), "must be a whole number or auto"),
    "ratio": (("--cache-ratio", 1.5), "must be above 0 and at most 1"),
    "both": (("--cache-ratio", 0.5, "--kv-lora-rank", 8), "give one of them"),
    "exact-rank": (("--method", "exact", "--kv-lora-rank", 8), "keeps all of the cache's numbers"),
    "method": (("--method", "magic"), "choose one of exact, "),
    "dtype": (("--dtype", "int4"), "choose one of float32, bfloat16, float16"),
    "device": (("--device", "cuda"), "sees no CUDA device"),
    "device-word": (("--device", "toaster"), "is not a device"),
    "tokens": (("--calibration", CALIBRATION, "--calibration-tokens", 100), "must be at least 512"),
    "tokens-of-each": (
        ("--calibration", CALIBRATION, "--calibration", "self", "--calibration-tokens", 1000),
        "must be at least 1024 (one window of 512 for each of 2 --calibration texts)",
    ),
    "no-text": (("--calibration", "/nowhere.txt"), "cannot be read"),
    "json": (("--json", "/nowhere/report.json"), "not a file in an existing folder"),
    "revision": (("--revision", "main"), "is on this machine, not on the hub: leave it out"),
    "exact-text": (("--method", "exact", "--calibration", "self"), "--calibration is for a method that reads text"),
    "exact-tokens": (("--method", "exact", "--calibration-tokens", 512), "--calibration-tokens is for a method that"),
    "mha2mla-text": (
        ("--method", "mha2mla", "--rope-keep", "low", "--calibration", "self"),
        "--calibration is for a method that reads text",
    ),
    "pasted": (("--calibration", "The quick brown fox. " * 20), "… cannot be read or written: File name too long."),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_refused_options(refused: Refused, case: str, source: Path, tmp_path: Path) -> None:
    options, reason = OPTIONS[case]
    assert reason in refused(source, *options)


def test_refused_tokenizer_of_special_tokens(refused: Refused, tmp_path: Path) -> None:
    folder = RandomModel().save(tmp_path / "special")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    assert "no tokens but special ones" in refused(folder, "--calibration", CALIBRATION)


def test_refused_calibration_text(refused: Refused, source: Path, tmp_path: Path) -> None:
    empty, short, binary = (tmp_path / name for name in ("empty.txt", "short.txt", "binary.txt"))
    empty.write_text(" \n")
    short.write_text("Too short.")
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    assert "is empty" in refused(source, "--calibration", empty)
    assert "too short" in refused(source, "--calibration", short)
    assert "cannot be read" in refused(source, "--calibration", binary)


def test_refused_tokenizer(refused: Refused, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(source, "--calibration", CALIBRATION)


def test_damaged_weights(refused: Refused, source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:50], b"\x00" * 200, b""):
        weights.write_bytes(damaged)
        assert "not a readable safetensors file" in refused(source, "--method", "exact")
    weights.unlink()
    assert "no safetensors weights" in refused(source)
    torch.save({}, source / "pytorch_model.bin")
    assert "pickle files (.bin), which are never loaded" in refused(source)


def test_wrong_tensors(refused: Refused, source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    assert f"{name} has shape [3, 3] where [48, 96] was expected" in refused(source)
    edit_tensors(source, lambda tensors: tensors.update({name: torch.zeros(48, 96, dtype=torch.int8)}))
    assert f"{name} has dtype I8" in refused(source)
    edit_tensors(source, lambda tensors: tensors.update({name: torch.full((48, 96), torch.nan)}))
    assert f"{name} of" in refused(source, "--method", "exact")


def test_too_narrow_dtype(refused: Refused, source: Path) -> None:
    """A number that fits into float32 may be infinite in float16."""
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors[name][0].fill_(1e5))
    line = refused(source, "--method", "exact", "--dtype", "float16")
    assert f"{name} would hold NaN or infinity as torch.float16" in line


def test_index_must_stay_in_its_folder(refused: Refused, source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    for name, reason in (("../model.safetensors", "not a file of the same folder"), ("a.safetensors", "missing")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert reason in refused(source)


@pytest.mark.parametrize("weight_map", [[], {"model.norm.weight": 5}])
def test_index_of_something_else(refused: Refused, weight_map: object, source: Path) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "does not map tensors to files" in refused(source, "--method", "exact")


def test_out_exists(refused: Refused, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "exists: choose another OUT" in refused(source, "--method", "exact")
    assert "will not replace it" in refused(source, "--method", "exact", "--force")
    assert (out / "precious.txt").read_text() == "mine"
    shutil.rmtree(out)
    convert(source, out, "--method", "exact")
    convert(source, out, "--method", "exact", "--force")


NAMES = {
    "Qwen/Qwen2.5-0.5B": "./Qwen2.5-0.5B-mla",
    "models/Llama-3.1-8B/": "./Llama-3.1-8B-mla",
    "models/llama-3.1.gguf": "./llama-3.1-mla",
}


@pytest.mark.parametrize("source", NAMES)
def test_command_in_the_report(source: str) -> None:
    """The model's name is not cut at a dot."""
    assert command_of(source, ConvertOptions()).split() == ["vllm-mla", "convert", source, NAMES[source]]


def test_table_card_and_plan_count_the_same_bytes(command_line: CommandLine, source: Path, tmp_path: Path) -> None:
    """16 bits a number, also where weights are float32, because vLLM serves them in bfloat16."""
    code, table, _ = command_line("convert", source, tmp_path / "out", "--method", "exact")
    assert code == 0 and "384 -> 384 bytes (16 bits)" in table
    assert "| KV cache per token, at 16 bits | 384 bytes | 384 bytes |" in (tmp_path / "out" / "README.md").read_text()
    assert plan(str(source)).source.kv_bytes_per_token == 384


@pytest.mark.parametrize("out", [".", "..", "../link"])
def test_out_holds_the_source(refusal: Refused, out: str, source: Path, tmp_path: Path) -> None:
    """It is not replaced by its own conversion."""
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "config.json").write_text("{}")
    before = digests(source)
    assert "which holds files of SOURCE" in refusal("convert", source, source / out, "--method", "exact", "--force")
    assert digests(source) == before


def test_report_is_shown_although_its_file_cannot_be_written(
    command_line: CommandLine, source: Path, tmp_path: Path
) -> None:
    code, table, complaint = command_line(
        "convert", source, tmp_path / "out", "--method", "exact", "--json", "/dev/full"
    )
    assert code == 2 and "/dev/full cannot be written: No space left on device." in complaint
    assert f"Serve it: vllm serve {tmp_path / 'out'}" in table and (tmp_path / "out" / "config.json").exists()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes(smollm2: Path, half: Path, tmp_path: Path) -> None:
    """A second conversion of a real model equals the first one to the byte."""
    assert digests(convert(smollm2, tmp_path / "again", *HALF)) == digests(half)


def test_other_seed_other_bytes(tmp_path: Path) -> None:
    source = RandomModel().save(tmp_path / "source")
    options = ("--calibration", CALIBRATION, "--calibration-tokens", 512, "--refit-steps", 1, *UNPACKED)
    one, other = (digests(convert(source, tmp_path / seed, *options, "--seed", seed)) for seed in ("1", "2"))
    assert one["model.safetensors"] != other["model.safetensors"]


def test_everything_is_carried_over(smollm2: Path, half: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (half / name).read_bytes() == (smollm2 / name).read_bytes()
    config = json.loads((half / "config.json").read_text())
    assert config["architectures"] == ["LlamaMLAForCausalLM"] and config["model_type"] == "llama_mla"
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 192 and config["qk_nope_head_dim"] == 64
    report = json.loads((half / "conversion_report.json").read_text())
    assert report["cache_ratio"] == 0.5 and report["method"] == "attention-aware"


def core_seconds() -> float:
    """CPU time of all child processes that have finished."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
def test_time_and_memory(smollm2: Path, tmp_path: Path) -> None:
    """Converting with 16k tokens from a file and a search for FreqFold takes at most 60 s on two cores, and 2 GB.

    Time is counted in core-seconds, because other jobs on the machine do not change these.
    """
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() * 10)
    report = tmp_path / "report.json"
    before = core_seconds()
    convert_alone(smollm2, tmp_path / "out", *TRANSMLA, "--cache-ratio", 0.5, "--calibration", text, "--json", report)
    assert core_seconds() - before < 2 * 60
    measured = json.loads(report.read_text())
    assert measured["calibration"]["tokens"] == 16384
    assert measured["peak_rss_bytes"] < 2e9
    (searched,) = measured["searches"]
    errors = searched["errors"]
    assert searched["title"] == "FreqFold" and measured["settings"]["freqfold"] == int(min(errors, key=errors.get))


def test_shards(tmp_path: Path) -> None:
    """A checkpoint in several shards is read and written like one in a single file."""
    from mla_converters.checkpoints.writer import Shards

    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    shards = Shards(tmp_path, {name: tensor.to("meta") for name, tensor in tensors.items()}, shard_bytes=1000)
    assert shards.allocate()
    for name, tensor in tensors.items():
        shards.write(name, tensor)
    shards.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert set(index["weight_map"].values()) == {f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


@pytest.fixture
def coded(source: Path, tmp_path: Path) -> Path:
    """A source whose tokenizer is Python code that leaves a mark when it runs."""
    mark = tmp_path.parent / f"{tmp_path.name}-ran"
    (source / "tokenization_own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    own = "tokenization_own.OwnTokenizer"
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, own]}, "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return mark


@pytest.mark.slow
def test_code_runs_only_where_it_is_trusted(
    refused: Refused, refusal: Refused, source: Path, coded: Path, tmp_path: Path
) -> None:
    """This holds for convert, verify and eval. A conversion also copies the code to the model."""
    assert "give --trust-remote-code" in refused(source, "--method", "exact")
    assert not coded.exists(), "it ran unasked"
    trust = "--trust-remote-code"
    out = convert(source, tmp_path / "mla", "--method", "exact", trust)
    assert coded.exists() and (out / "tokenization_own.py").exists()
    assert trust in json.loads((out / "conversion_report.json").read_text())["command"]
    coded.unlink()
    scored = ("--text", CALIBRATION, "--windows", 1, "--length", 32)
    assert "give --trust-remote-code" in refusal("eval", out, *scored)
    assert not coded.exists(), "it ran unasked"
    assert vllm_mla("eval", out, *scored, trust).returncode == 0
    assert vllm_mla("verify", out).returncode == 1
    assert vllm_mla("verify", out, trust).returncode == 0
