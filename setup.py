"""Maps the folder ``converters/`` to the import name ``mla_converters``.

A top-level module called ``converters`` would collide with users' own code. Everything else
about the package is in ``pyproject.toml``.
"""

from setuptools import setup

PLUGIN_PACKAGES = [
    "vllm_mla_plugin",
    "vllm_mla_plugin.backends",
    "vllm_mla_plugin.hf",
    "vllm_mla_plugin.models",
]
CONVERTER_PACKAGES = [
    "mla_converters",
    "mla_converters.bench",
    "mla_converters.commands",
    "mla_converters.evaluation",
    "mla_converters.methods",
    "mla_converters.planning",
]

setup(
    packages=[*PLUGIN_PACKAGES, *CONVERTER_PACKAGES],
    package_dir={"mla_converters": "converters"},
)
