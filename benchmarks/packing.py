"""Measures what each part of a packed cache buys, by the error of the attention outputs.

    python -m benchmarks.packing --valid wiki.valid.tokens

Converts 6 layers of SmolLM2-135M-Instruct, evenly spread over it, without any fit, and rounds their caches to a few
formats. The error is the squared difference from the source's output, relative to the source's output, on a window of
2,048 tokens; the statistics are of 4 windows of text and one of random tokens. The rows differ in the order and the
scale of the cached components, which cost nothing when the model is served, and in the mean that is taken out.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import plain_parser, plain_text, write_result
from mla_converters.checkpoints.source import open_source
from mla_converters.latent.cache_size import CacheBudget
from mla_converters.latent.maps import LatentMap
from mla_converters.methods.attention_aware.layer import (
    ATTENTION_WINDOWS,
    ERROR_WINDOWS,
    first_weighing,
    layer_map,
    layer_model,
)
from mla_converters.methods.attention_aware.map import ScoreModel
from mla_converters.methods.attention_aware.noise import Components, arranged, costs, spreads, suited_to_packing
from mla_converters.methods.layer_conversion import map_errors
from mla_converters.methods.search import sampled_layers
from mla_converters.streaming.layers import embed, source_layers
from mla_converters.support.progress import progress_bars
from mla_converters.text.calibration import calibrate, calibration_texts
from scripts.demo_model import demo_folder
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

LAYERS = 6
TOKENS = 2048
FORMATS = {
    "all numbers, 4 bits: 28.1%": "192x4g32/192x4g32",
    "as searched: 25.0%": (
        "16x5g16+64x4g16+64x3g16c+48x2g16c/16x5g16+16x4g16+48x3g16c+16x2g16c+16x5g16+16x4g16+48x3g16c+16x2g16c"
    ),
    "fewer numbers, 4 bits: 25.0%": "148x4g32/192x4g32",
}
"""By what they are, and their bytes as a share of 384 numbers of 16 bits. The second is what a search for a quarter of
the bytes found."""
Arrangement = Callable[[LatentMap, ScoreModel], LatentMap]


def with_power(power: float, is_sorted: bool = True) -> Arrangement:
    """Components of unit spread, multiplied by ``cost ** (power / 2)``: 0 for the same noise in all of a group, 1/2 for
    the least cost, 1 for noise of the same cost. They are sorted by cost, or stay in the order of the map."""

    def arrange(maps: LatentMap, model: ScoreModel) -> LatentMap:
        found, spread = costs(maps, model), Components(*spreads(maps, model.covariance))
        powers = [(cost / cost.mean()).clamp(min=1e-9) ** (power / 2) for cost in (found.latent, found.rope)]
        scales = Components(powers[0] / spread.latent, powers[1] / spread.rope)
        orders = (cost.argsort(descending=True, stable=True) for cost in (found.latent, found.rope))
        own = (torch.arange(len(cost)) for cost in (found.latent, found.rope))
        return arranged(maps, scales, *(orders if is_sorted else own))

    return arrange


ARRANGEMENTS: dict[str, Arrangement] = {
    "the method": suited_to_packing,
    "not sorted by cost": with_power(0.5, is_sorted=False),
    "scaled to unit spread alone": with_power(0),
    "scaled so that noise costs the same everywhere": with_power(1),
    "scaled to a mean square of one, mean included, not sorted": lambda maps, _: maps,
}
WITHOUT_MEAN = "the mean is not taken out"
NOT_ROUNDED = "nothing is rounded"


def measure(text: Path) -> dict[str, dict[str, float]]:
    """The mean error over the layers, by row and format."""
    rows = {name: dict.fromkeys(FORMATS, 0.0) for name in (*ARRANGEMENTS, WITHOUT_MEAN, NOT_ROUNDED)}
    with open_source(str(demo_folder())) as source, progress_bars(False) as progress:
        windows = calibration_texts(source, [str(text)], ATTENTION_WINDOWS * TOKENS, 0, progress, TOKENS)["used"]
        hidden = embed(source, calibrate(windows, source, 0).windows)
        measured = sampled_layers(source, LAYERS)
        for layer in source_layers(source, "cpu"):
            if layer.index in measured:
                model = layer_model(layer, hidden[:-1], hidden[-1:], frozenset())
                for column, spec in FORMATS.items():
                    format = CacheFormat.parse(spec)
                    maps = layer_map(layer, model, CacheBudget(*format.sizes), first_weighing(frozenset()))
                    best = suited_to_packing(maps, model)
                    tried = [(arrange(maps, model), format) for arrange in ARRANGEMENTS.values()]
                    tried += [(best, replace(format, mean=False)), (best, None)]
                    errors = map_errors(layer, hidden[:ERROR_WINDOWS], tried)
                    for name, error in zip(rows, errors, strict=True):
                        rows[name][column] += error / len(measured)
            layer.advance(hidden, layer.attend)
    return {name: {column: round(error, 5) for column, error in row.items()} for name, row in rows.items()}


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--valid", type=Path, required=True, help="wiki.valid.tokens")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        text = Path(folder) / "valid.txt"
        text.write_text(plain_text(arguments.valid))
        rows = measure(text)
    for name, row in rows.items():
        print(f"{name:60s}", *(f"{column}  {error:.5f}" for column, error in row.items()), sep="   ")
    content = {"formats": FORMATS, "mean_output_error": rows}
    write_result("packing", "python -m benchmarks.packing --valid wiki.valid.tokens", content)


if __name__ == "__main__":
    main()
