"""GGUF files: each converts to what its folder converts to."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import UNPACKED, contents, convert, heal
from support.files import CALIBRATION
from support.gguf_files import Case, GgufFile
from support.models import LLAMA3, MIXTRAL_EXPERTS, QWEN3_EXPERTS, YARN, RandomModel, load

from mla_converters.checkpoints.gguf import values
from mla_converters.checkpoints.gguf.header import read_header
from mla_converters.checkpoints.manifest import MANIFEST
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from mla_converters.evaluation.run import evaluate
from mla_converters.options import EvalOptions, PlanOptions, VerifyOptions
from mla_converters.planning.plan import plan
from mla_converters.verify import verify

EXACT = ("--method", "exact")
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MOE = QWEN3_EXPERTS | {"mlp_only_layers": [], "norm_topk_prob": True}


RIGHT = {
    "llama": Case(RandomModel()),
    "llama-tied": Case(RandomModel(tied=True)),
    "llama-biases": Case(RandomModel(bias=True)),
    "llama-nine-heads": Case(RandomModel(heads=9, kv_heads=3, hidden=144)),
    "llama-no-lengths": Case(
        RandomModel(), GgufFile(keys={"llama.attention.key_length": None, "llama.attention.value_length": None})
    ),
    "split": Case(RandomModel(), GgufFile(tensors_per_part=8)),
    "linear": Case(RandomModel(rope=LINEAR)),
    "linear-old": Case(
        RandomModel(rope=LINEAR),
        GgufFile(
            keys={"llama.rope.scaling.type": None, "llama.rope.scaling.factor": None, "llama.rope.scale_linear": 4.0}
        ),
    ),
    "llama31": Case(RandomModel(rope=LLAMA3)),
    "llama31-8192": Case(RandomModel(rope=LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192})),
    "yarn": Case(RandomModel(rope=YARN)),
    "yarn-betas": Case(
        RandomModel(rope=YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}),
        GgufFile(
            keys={
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
                "llama.rope.scaling.yarn_attn_factor": 1.3,
            }
        ),
    ),
    "mistral": Case(RandomModel("mistral", window=256)),
    "mixtral": Case(RandomModel("mixtral", experts=MIXTRAL_EXPERTS)),
    "mixtral-one-by-one": Case(RandomModel("mixtral", experts=MIXTRAL_EXPERTS), GgufFile(stacked=False)),
    "qwen2": Case(RandomModel("qwen2")),
    "qwen2-yarn": Case(RandomModel("qwen2", rope=YARN)),
    "qwen3": Case(RandomModel("qwen3", head_dim=32, tied=True)),
    "qwen3moe": Case(RandomModel("qwen3_moe", head_dim=32, experts=MOE)),
}


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    ids = torch.randint(0, 199, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        # transformers' faster loop over experts has no float64.
        return load(folder, dtype, experts_implementation="eager")(ids).logits


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str, tmp_path: Path) -> None:
    """The converted file computes what the folder computes of which the file was made."""
    source, files = RIGHT[case].write(tmp_path)
    out = convert(files[-1], tmp_path / "out", *EXACT)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        expected, got = logits(source, dtype), logits(out, dtype)
        assert (got - expected).norm() < tolerance * expected.norm()
    assert json.loads((out / "config.json").read_text())["mla_conversion"]["unknown_keys"] == []


@pytest.mark.parametrize("case", RIGHT)
def test_same_tensors(case: str, tmp_path: Path) -> None:
    """Bit for bit, under the folder's names; as a folder of its own too."""
    source, files = RIGHT[case].write(tmp_path)
    expected = load_file(source / "model.safetensors")
    with open_source(str(files[0])) as opened:
        assert opened.names() == sorted(expected)
        assert all(torch.equal(opened.tensor(name), expected[name]) for name in expected)
        unpacked = load_file(opened.model_folder / "model.safetensors")
    assert unpacked.keys() == expected.keys()
    assert all(torch.equal(unpacked[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_stored_kinds(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as ``gguf`` dequantises whole tensors; 16-bit floats stay what they are."""
    monkeypatch.setattr(values, "BLOCK", 5 * 64)  # five rows of the embedding
    _, (path,) = Case(RandomModel("qwen2"), GgufFile(kind=kind)).write(tmp_path)
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    names = {"model.embed_tokens": "token_embd", "model.layers.1.mlp.up_proj": "blk.1.ffn_up"}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_source(str(path)) as source:
        for name, own in ((f"{name}.weight", f"{own}.weight") for name, own in names.items()):
            assert stored[own].tensor_type.name == kind
            expected = gguf.dequantize(stored[own].data, stored[own].tensor_type)
            assert source.tensor(name).dtype == plain.get(kind, torch.float32)
            np.testing.assert_array_equal(source.tensor(name).float().numpy(), expected)
        assert source.tensor("model.norm.weight").dtype == torch.float32
    out = convert(path, tmp_path / "out", *EXACT)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(plain.get(kind, torch.float32))[6:]


def test_header(tmp_path: Path) -> None:
    """The same header that the ``gguf`` package reads."""
    _, (path,) = RIGHT["llama31"].write(tmp_path)
    reader, header = gguf.GGUFReader(path), read_header(path)
    keys = {name: item.contents() for name, item in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.keys == keys
    tensors = {tensor.name: (tensor.data_offset, tensor.tensor_type, tensor.n_bytes) for tensor in reader.tensors}
    assert {name: (x.offset, x.kind, x.size) for name, x in header.tensors.items()} == tensors


def written(source: Path, out: Path) -> dict[str, bytes]:
    """What a conversion writes, without the source's name and the checksums that depend on it."""
    files = contents(convert(source, out, *EXACT))
    del files[MANIFEST]
    return {name: content.replace(source.stem.encode(), b"SOURCE") for name, content in files.items()}


def test_parts_give_the_same_bytes(tmp_path: Path) -> None:
    """Whole or in parts, and whichever part is named: nothing differs but the name of the source."""
    source = RandomModel("qwen2").save(tmp_path / "source")
    (whole,) = GgufFile().write(source, tmp_path / "undivided.gguf")
    parts = GgufFile(tensors_per_part=9).write(source, tmp_path / "part.gguf")
    assert len(parts) > 2
    expected = written(whole, tmp_path / "out")
    for part in (parts[0], parts[-1]):
        assert written(part, tmp_path / part.stem) == expected


def test_unknown_keys_are_reported(tmp_path: Path) -> None:
    keys = {
        "llama.new_idea": 3,
        "tokenizer.ggml.new_idea": 3,
        "llama.rope.scaling.finetuned": True,
        "llama.logit_scale": 1.0,
    }
    _, (path,) = Case(RandomModel(), GgufFile(keys=keys)).write(tmp_path)
    out = convert(path, tmp_path / "out", *EXACT)
    assert json.loads((out / "conversion_report.json").read_text())["unknown_keys"] == [
        "llama.new_idea",
        "tokenizer.ggml.new_idea",
    ]


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the header alone, what the folder's plan says."""
    source, (path,) = RIGHT["qwen3moe"].write(tmp_path)
    expected = plan(str(source), PlanOptions())
    monkeypatch.setattr("mla_converters.checkpoints.gguf.config.read_values", pytest.fail)
    got = plan(str(path), PlanOptions())
    assert got.layouts == expected.layouts
    assert got.conversion == expected.conversion
    assert got.source.model_copy(update={"name": expected.source.name}) == expected.source
    assert f"convert {path} ./model-mla" in got.command
    _, (lacking,) = Case(RandomModel(), GgufFile(tensors={"blk.1.ffn_down.weight": None})).write(tmp_path)
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_down\.weight is missing"):
        plan(str(lacking), PlanOptions())


def test_as_source_of_everything(tmp_path: Path) -> None:
    """Calibration on the model's own text, verification against the file, and evaluation of it."""
    _, (path,) = Case(RandomModel(std=0.05), GgufFile(kind="Q8_0")).write(tmp_path)
    options = ("--calibration", "self", "--calibration-tokens", 1024, "--refit-steps", 1)
    out = convert(path, tmp_path / "out", *UNPACKED, *options)
    report = verify(out, VerifyOptions(source=str(path)))
    assert report.ok, report
    few_steps = ("--text", CALIBRATION, "--tokens", 2048, "--batch-size", 1, "--steps", 3, "--learning-rate", 1e-4)
    assert heal(out, tmp_path / "healed", "--source", path, *few_steps).is_dir()
    text = Path(__file__)
    asked = EvalOptions(text=text, windows=1, length=64, reference=str(path))
    (row,) = evaluate([str(path)], asked, quiet=True).models
    assert row.name == str(path) and row.kl == 0


@pytest.mark.slow
def test_real_model_in_parts(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2 whole and cut in three: the same bytes, but for the name of the source."""
    reader = gguf.GGUFReader(smollm2_gguf)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama", split_max_tensors=-(-len(reader.tensors) // 3))
    for name, item in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array = item.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, item.contents(), item.types[0], sub_type=item.types[-1] if array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = tmp_path / "part-00002-of-00003.gguf"
    link = tmp_path / smollm2_gguf.name
    link.symlink_to(smollm2_gguf)
    expected, got = (written(path, tmp_path / path.stem) for path in (link, part))
    assert all(got[name] == expected[name] for name in got.keys() | expected.keys())
