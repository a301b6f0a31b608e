"""The recipes are configurations that ``accelerate launch`` reads, and as many devices as their names say."""

import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from support.files import ROOT

RECIPES = sorted((ROOT / "docs" / "recipes").iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe) -> None:
    config = load_config_from_file(str(recipe))
    devices = int(re.match(r"(\d+)-gpus?\.yaml", recipe.name)[1])
    assert config.num_processes == devices
    assert config.num_machines == max(1, devices // 8)
    assert not config.use_cpu and config.mixed_precision == "bf16"
    if devices > 1:
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


def test_every_recipe_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "training.md").read_text()
    named = set(re.findall(r"docs/recipes/([\w-]+\.yaml)", guide))
    assert named <= {path.name for path in RECIPES}
    assert len(named) >= 2
