"""Quantised sources: their attention is dequantised as the format's own code does, the rest is carried over."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import UNPACKED, Refused, convert
from support.files import CALIBRATION
from support.models import QWEN3_EXPERTS, RandomModel
from support.quantised_sources import FORMATS, WEIGHTS, quantise_source
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from mla_converters.checkpoints.source import open_source
from mla_converters.options import VerifyOptions
from mla_converters.verify import verify

# Three KV heads of 32 numbers: neither 40 nor 64 divides 96.
MODEL = RandomModel(heads=6, kv_heads=3, head_dim=32, hidden=96, intermediate=64, bias=True)
ATTENTION = ".self_attn."
IGNORED = {
    "fp8": ("modules_to_not_convert", "model.layers.1.self_attn.kv_b_proj"),
    "compressed-tensors": ("ignore", r"re:.*\.self_attn\..*"),
    "gptq": ("dynamic", r"-:.*\.self_attn\..*"),
    "awq": ("modules_to_not_convert", "self_attn"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_as_the_reference(name: str, tmp_path: Path) -> None:
    """Weights equal the reference bit for bit. The conversion is that of the plain twin; other tensors keep their
    bytes; and the configuration says that the attention is not quantised."""
    # AWQ and GPTQ have scales of float16.
    dtype = torch.float16 if name.startswith(("gptq", "awq")) else torch.bfloat16
    quantised, plain = quantise_source(MODEL.save(tmp_path / "source"), name, tmp_path, dtype)
    expected, stored = load_file(plain / WEIGHTS), load_file(quantised / WEIGHTS)
    with open_source(str(quantised)) as source:
        assert source.names() == sorted(expected)
        for key in expected:
            assert torch.equal(source.tensor(key), expected[key]), key
            assert source.meta(key).dtype == expected[key].dtype == dtype
    out, twin = (convert(folder, tmp_path / f"{folder.name}-mla", "--method", "exact") for folder in (quantised, plain))
    got, wanted = load_file(out / WEIGHTS), load_file(twin / WEIGHTS)
    attention = {key for key in wanted if ATTENTION in key}
    assert {key for key in got if ATTENTION in key} == attention
    assert all(torch.equal(got[key], wanted[key]) for key in attention)
    others = {key for key in stored if ATTENTION not in key}
    assert got.keys() - attention == others and any("scale" in key for key in others)
    for key in others:
        assert got[key].dtype == stored[key].dtype and got[key].shape == stored[key].shape
        assert got[key].flatten().view(torch.uint8).equal(stored[key].flatten().view(torch.uint8)), key
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    key, entry = IGNORED[config["quant_method"]]
    assert entry in config[key]
    assert {k: v for k, v in config.items() if k != key} == {k: v for k, v in FORMATS[name].config.items() if k != key}


def test_vllm_skips_the_attention_of_fp8(tmp_path: Path) -> None:
    """vLLM finds every projection of MLA in the list of what is not quantised, and no other."""
    quantised, _ = quantise_source(MODEL.save(tmp_path / "source"), "fp8-block", tmp_path)
    config = json.loads((convert(quantised, tmp_path / "mla", "--method", "exact") / "config.json").read_text())
    ignored = config["quantization_config"]["modules_to_not_convert"]
    fused = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for name in ("q_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "qkv_proj"):
        assert is_layer_skipped(f"model.layers.1.self_attn.{name}", ignored, fused), name
    for name in ("gate_up_proj", "down_proj"):
        assert not is_layer_skipped(f"model.layers.1.mlp.{name}", ignored, fused), name


def test_calibrated_and_packed(tmp_path: Path) -> None:
    """Calibration runs through dequantised MLPs and experts: the same conversion as of the plain twin. A dtype that is
    asked for leaves the quantised modules alone, and the check of the converted folder accepts them."""
    model = replace(
        MODEL, family="qwen3_moe", tied=True, layers=3, experts=QWEN3_EXPERTS | {"moe_intermediate_size": 64}
    )
    quantised, plain = quantise_source(model.save(tmp_path / "source"), "w4a16", tmp_path)
    options = (
        "--calibration",
        CALIBRATION,
        "--calibration-tokens",
        512,
        "--refit-steps",
        0,
        *UNPACKED,
        "--dtype",
        "float16",
    )
    out, twin = (convert(folder, tmp_path / f"{folder.name}-mla", *options) for folder in (quantised, plain))
    got, wanted = load_file(out / WEIGHTS), load_file(twin / WEIGHTS)
    for key, tensor in wanted.items():
        if ATTENTION in key:
            assert torch.equal(got[key], tensor), key
    stored = load_file(quantised / WEIGHTS)
    scale = "model.layers.1.mlp.experts.2.down_proj.weight_scale"
    assert got[scale].dtype == torch.bfloat16 and torch.equal(got[scale], stored[scale])
    assert got["model.norm.weight"].dtype == torch.float16
    verification = verify(out, VerifyOptions(source=str(quantised)))
    assert verification.ok, verification
    assert {check.name for check in verification.checks} >= {"tensors", "predictions"}


def test_sampled_from_itself(refusal: Refused, tmp_path: Path) -> None:
    """The default text is sampled from the dequantised model. Healing is refused with the way out."""
    quantised, plain = quantise_source(MODEL.save(tmp_path / "source"), "awq", tmp_path, torch.float16)
    options = ("--calibration-tokens", 512, "--refit-steps", 0, *UNPACKED)
    out, twin = (convert(folder, tmp_path / f"{folder.name}-mla", *options) for folder in (quantised, plain))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(load_file(out / WEIGHTS)[name], load_file(twin / WEIGHTS)[name])
    sentence = refusal("heal", out, tmp_path / "healed", "--text", CALIBRATION)
    assert "has quantised weights, through which healing does not train: convert the unquantised model" in sentence
    assert not (tmp_path / "healed").exists()


BROKEN = {
    "format": ("w4a16", {"format": "nvfp4-pack-quantized"}, None, "compressed-tensors, format nvfp4-pack-quantized"),
    "method": ("w4a16", {"quant_method": "bitsandbytes"}, None, "quantised (bitsandbytes): convert the unquantised"),
    "version": ("awq", {"version": "gemv"}, None, "quantised (awq, version gemv)"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, None, "quantised (gptq, checkpoint_format marlin)"),
    "scales": ("gptq", {}, ("k_proj.scales", lambda x: x[:2]), "cannot be read as gptq"),
    "missing": ("awq", {}, ("k_proj.scales", None), "cannot be read as awq ('scales')"),
    "plain": ("awq", {"quant_method": "fp8"}, None, "are quantised (fp8), but they are plain"),
    "unapplied": ("w8a8-int8", {}, ("k_proj.weight", torch.Tensor.float), "has scales but dtype F32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(case: str, refusal: Refused, tmp_path: Path) -> None:
    """Formats that are not read, and tensors that do not fit, with nothing left behind."""
    name, changes, change, reason = BROKEN[case]
    quantised, _ = quantise_source(MODEL.save(tmp_path / "source"), name, tmp_path, torch.float16)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] |= changes
    (quantised / "config.json").write_text(json.dumps(config))
    if change is not None:
        tensors = load_file(quantised / WEIGHTS)
        key = f"model.layers.1.self_attn.{change[0]}"
        tensor = tensors.pop(key)
        if change[1] is not None:
            tensors[key] = change[1](tensor).contiguous()
        save_file(tensors, quantised / WEIGHTS, metadata={"format": "pt"})
    assert reason in refusal("convert", quantised, tmp_path / "mla", "--method", "exact")
    assert not (tmp_path / "mla").exists()
