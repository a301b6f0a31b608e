"""A checkpoint folder as transformers takes it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_converters.checkpoints.reader import INDEX, SINGLE, Checkpoint
from mla_converters.support.json_files import write_json


@contextmanager
def loadable(name: str | Path) -> Iterator[str | Path]:
    """What to give ``from_pretrained`` for a model: its name, or for shards without an index a folder with one.

    Args:
        name: folder or hub id.

    Yields:
        The name; or a folder of links to the same files and an index, for the time of the ``with`` block.

    Raises:
        ConversionError: the weights cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir() or any((folder / file).exists() for file in (SINGLE, INDEX)):
        yield name
        return
    weight_map = Checkpoint(folder).weight_map()
    with tempfile.TemporaryDirectory(prefix="vllm-mla-index-") as scratch:
        for path in folder.iterdir():
            Path(scratch, path.name).symlink_to(path.resolve())
        write_json(Path(scratch, INDEX), {"metadata": {}, "weight_map": weight_map})
        yield scratch
