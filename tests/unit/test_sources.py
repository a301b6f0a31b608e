"""Sources as people have them: files under other names and in other places, and folders that are something else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import UNPACKED, CommandLine, Refused, contents, convert, vllm_mla
from support.download_hub import Hub, download_hub
from support.files import CALIBRATION
from support.models import RandomModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXACT = ("--method", "exact")
CUT = ("--text", CALIBRATION, "--windows", 1, "--length", 64)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture(scope="module")
def expected(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of its conversion."""
    return (convert(pristine, tmp_path_factory.mktemp("expected") / "mla", *EXACT) / WEIGHTS).read_bytes()


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A model that a test may change."""
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def in_parts(source: Path, names: tuple[str, ...]) -> None:
    """Cut the weights into files of these names."""
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    for place, name in enumerate(names):
        part = {key: tensors[key] for key in sorted(tensors)[place :: len(names)]}
        save_file(part, source / name, metadata={"format": "pt"})


PARTS = {
    "one": ("model-00001-of-00001.safetensors",),
    "three": tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_without_an_index(
    case: str, source: Path, expected: bytes, command_line: CommandLine, tmp_path: Path
) -> None:
    """Converted, sampled from, and compared with by transformers, which asks for an index."""
    in_parts(source, PARTS[case])
    out = convert(source, tmp_path / "mla", *EXACT)
    assert (out / WEIGHTS).read_bytes() == expected
    assert command_line("verify", out, "--source", source)[0] == 0
    few = ("--calibration-tokens", 512, "--refit-steps", 0, *UNPACKED)
    assert command_line("convert", source, tmp_path / "calibrated", *few)[0] == 0
    assert not (source / INDEX).exists()


def test_missing_part(source: Path, refusal: Refused, tmp_path: Path) -> None:
    in_parts(source, PARTS["three"])
    (source / PARTS["three"][1]).unlink()
    line = refusal("convert", source, tmp_path / "mla", *EXACT)
    assert f"{PARTS['three'][1]}, which holds a part of the weights, is missing" in line


def test_parts_of_two_checkpoints(source: Path, refusal: Refused, tmp_path: Path) -> None:
    in_parts(source, PARTS["three"])
    shutil.copyfile(source / PARTS["three"][0], source / PARTS["one"][0])
    assert "parts of several checkpoints" in refusal("convert", source, tmp_path / "mla", *EXACT)


def test_tensor_twice(source: Path, refusal: Refused, tmp_path: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, source / PARTS["one"][0])
    line = refusal("convert", source, tmp_path / "mla", *EXACT)
    assert f"has model.norm.weight twice, in model-00001-of-00001.safetensors and {WEIGHTS}" in line


def test_links(source: Path, expected: bytes, refusal: Refused, tmp_path: Path) -> None:
    """A user's links go where the user keeps the files; what an index names stays in the folder."""
    (tmp_path / "store").mkdir()
    shutil.move(source / WEIGHTS, tmp_path / "store" / "blob")
    (source / WEIGHTS).symlink_to("../store/blob")
    assert (convert(source, tmp_path / "mla", *EXACT) / WEIGHTS).read_bytes() == expected
    (source / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../store/blob"}}))
    assert "not a file of the same folder" in refusal("convert", source, tmp_path / "other", *EXACT)
    (source / INDEX).unlink()
    (tmp_path / "store" / "blob").unlink()
    assert f"{WEIGHTS}, which holds a part of the weights, is missing" in refusal(
        "convert", source, tmp_path / "other", *EXACT
    )


def test_path_with_umlauts(source: Path, expected: bytes, command_line: CommandLine, tmp_path: Path) -> None:
    folder = source.rename(tmp_path / "größere Modelle 模型")
    out = convert(folder, tmp_path / "ü mla", *EXACT)
    assert (out / WEIGHTS).read_bytes() == expected
    assert command_line("verify", out, "--source", folder)[0] == 0


ADDRESSES = {
    "https://huggingface.co/Qwen/Qwen2.5-7B": "give the model's id on the hub, Qwen/Qwen2.5-7B.",
    "huggingface.co/Qwen/Qwen2.5-7B/": "give the model's id on the hub, Qwen/Qwen2.5-7B.",
    "https://hf.co/Qwen/Qwen2.5-7B/tree/main": "give the model's id on the hub, Qwen/Qwen2.5-7B.",
    "https://huggingface.co/a/b/tree/v1.0?x=1#y": "the hub, a/b, and --revision v1.0.",
    "https://huggingface.co/a/b/blob/main/q4.gguf": "download the file with hf download a/b q4.gguf",
    "https://example.org/a/b": "is a web address, which is not fetched",
}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("command", ["convert", "eval"])
def test_web_addresses(command: str, address: str, refusal: Refused, tmp_path: Path) -> None:
    rest = {"convert": (tmp_path / "mla",), "eval": CUT}[command]
    assert ADDRESSES[address] in refusal(command, address, *rest)


def test_web_address_of_a_plan(refusal: Refused) -> None:
    assert "give the model's id on the hub, a/b." in refusal("plan", "https://huggingface.co/a/b")


def touch(*names: str) -> dict[str, bytes]:
    return dict.fromkeys(names, b"{}")


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "r": 8}
KINDS = {
    "adapter": (
        {"adapter_config.json": json.dumps(ADAPTER).encode(), "adapter_model.safetensors": b""},
        "is an adapter (LORA) for meta-llama/Llama-3.2-1B, not a model: merge it into meta-llama/Llama-3.2-1B first",
    ),
    "adapter-of-something": (touch("adapter_config.json"), "is an adapter (of PEFT) for the model that it was trained"),
    "mistral": (touch("params.json", "consolidated.safetensors", "tekken.json"), "in Mistral's own format"),
    "meta": (touch("params.json", "consolidated.00.pth", "tokenizer.model"), "in Meta's own format"),
    "gguf": (touch("a-q4.gguf", "a-q8.gguf", "README.md"), "GGUF files: give the path of the one to convert"),
    "diffusion": (touch("model_index.json"), "a diffusion pipeline"),
    "onnx": (touch("onnx/model.onnx", "tokenizer.json"), "in ONNX format"),
    "openvino": (touch("openvino_model.xml", "openvino_model.bin"), "OpenVINO's format"),
    "tensorrt": (touch("rank0.engine"), "a TensorRT engine"),
    "tensorflow": (touch("tf_model.h5"), "TensorFlow weights"),
    "flax": (touch("flax_model.msgpack"), "Flax weights"),
    "nemo": (touch("model.nemo"), "NeMo's format"),
    "distributed": (touch("__0_0.distcp", ".metadata"), "a distributed checkpoint"),
    "deepspeed": (touch("zero_to_fp32.py", "latest"), "a DeepSpeed checkpoint"),
    "pickles": (touch("pytorch_model.bin"), "pickle files (.bin), which are never loaded"),
    "training-run": (touch("checkpoint-500/config.json", "checkpoint-500/model.safetensors"), "(checkpoint-500)"),
    "nothing": (touch("notes.txt"), "it has no config.json"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_other_formats(command: str, kind: str, refusal: Refused, tmp_path: Path) -> None:
    """Each is named, with what to do."""
    files, reason = KINDS[kind]
    for name, content in files.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    assert reason in refusal(command, tmp_path / "source", *((tmp_path / "mla",) if command == "convert" else ()))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["gguf", "onnx", "pickles", "adapter", "mistral"])
def test_other_formats_beside_a_config(kind: str, source: Path, refusal: Refused, tmp_path: Path) -> None:
    (source / WEIGHTS).unlink()
    files, reason = KINDS[kind]
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    assert reason in refusal("convert", source, tmp_path / "mla")


OTHER_MODELS = {
    "modules.json": ("[]", {}, "gives embeddings or scores and does not generate text"),
    "sequence": (None, {"architectures": ["LlamaForSequenceClassification"]}, "gives embeddings or scores"),
    "model": (None, {"architectures": ["LlamaModel"]}, "The source (LlamaModel) gives embeddings"),
    "quantize_config.json": ("{}", {}, "quantised (GPTQ)"),
    "quant_config.json": ("{}", {}, "quantised (AWQ)"),
    "hf_quant_config.json": ("{}", {}, "quantised (ModelOpt)"),
    "mlx": (None, {"quantization": {"group_size": 64, "bits": 4}}, "quantised (MLX)"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_other_models(command: str, kind: str, source: Path, refusal: Refused, tmp_path: Path) -> None:
    content, fields, reason = OTHER_MODELS[kind]
    if content is not None:
        (source / kind).write_text(content)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    assert reason in refusal(command, source, *((tmp_path / "mla",) if command == "convert" else ()))


def test_other_tensors(source: Path, refusal: Refused, tmp_path: Path) -> None:
    """An embedding model calls itself a causal one, and weights may be quantised where no file says so."""
    tensors = load_file(source / WEIGHTS)
    for changed, reason in (
        ({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, "which is an embedding model"),
        (tensors | {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2)}, "quantised (it has model.layers.0.mlp.up"),
        (tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2)}, "an adapter that is not merged"),
    ):
        save_file(changed, source / WEIGHTS, metadata={"format": "pt"})
        assert reason in refusal("convert", source, tmp_path / "mla")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with download_hub() as server:
        yield server


WANTED = ("tekken.json", "NOTICE", "USE_POLICY.md", "LICENSE", "additional_chat_templates/tool_use.jinja")
UNWANTED = (
    "consolidated.safetensors",
    "params.json",
    "fp16/model.safetensors",
    "fp16/config.json",
    "checkpoint-500/tokenizer.json",
    "onnx/model.onnx",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "model.q4.gguf",
)


def test_what_is_fetched(hub: Hub, pristine: Path, expected: bytes, tmp_path: Path) -> None:
    """Of a repository: one copy of the weights, and every file that means something."""
    hub.files = contents(pristine) | {name: name.encode() for name in (*WANTED, *UNWANTED)}
    out = tmp_path / "mla"
    result = vllm_mla("convert", "lab/tiny", out, *EXACT, environment=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert (out / WEIGHTS).read_bytes() == expected
    assert all((out / name).read_text() == name for name in WANTED)
    assert hub.fetched >= {*contents(pristine), *WANTED} and not hub.fetched & set(UNWANTED)


def test_repository_of_something_else(hub: Hub, tmp_path: Path) -> None:
    """Named by what is in it, without fetching that."""
    hub.files = touch("model.q4.gguf", "README.md")
    for command in (("convert", "lab/tiny", tmp_path / "mla"), ("plan", "lab/tiny")):
        result = vllm_mla(*command, environment=hub.environment(tmp_path / "home"))
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "lab/tiny is not a model folder: it holds GGUF files" in result.stderr
    assert "model.q4.gguf" not in hub.fetched
