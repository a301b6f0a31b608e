"""How far does a packed cache carry rounding? Perplexity, if a model's embeddings change by a millionth of their size.

    python -m benchmarks.rounding_noise MODEL... --test wiki.test.raw [--windows 8] [--seeds 4]

The scores of two programs that compute the same model in float32, such as vLLM and transformers, cannot be expected to
agree better than those of one program do here. The first score of a model is that of the unchanged one.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import plain_parser, write_result
from mla_converters.checkpoints.models import Model, load_model, read_config
from mla_converters.options import TextProtocol
from mla_converters.text.read import read_text
from mla_converters.text.scoring import shared_windows

RELATIVE = 1e-6
"""Standard deviation of the change, relative to each number. Half of float32's last place is 6e-8 or less."""
LENGTH = 1024


@torch.inference_mode()
def losses(model: Model, ids: torch.Tensor, seed: int | None) -> torch.Tensor:
    """Each token's loss ``[windows, length - 1]``, nats; the embeddings are changed unless ``seed`` is None."""
    network = load_model(model, torch.float32, "cpu")
    if seed is not None:
        weight = network.get_input_embeddings().weight
        weight.mul_(1 + RELATIVE * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    logits = (network(window[None], use_cache=False).logits[0, :-1] for window in ids)
    return torch.stack([F.cross_entropy(*pair, reduction="none") for pair in zip(logits, ids[:, 1:], strict=True)])


def row(model: Model, ids: torch.Tensor, seeds: int) -> dict[str, Any]:
    """Perplexities, and how far they and the tokens' losses are apart."""
    all_losses = [losses(model, ids, seed) for seed in (None, *range(seeds))]
    perplexities = [math.exp(each.mean().item()) for each in all_losses]
    apart = [(each - all_losses[0]).abs().mean().item() for each in all_losses[1:]]
    return {
        "latent_cache": model.cache_format,
        "perplexity": [round(perplexity, 4) for perplexity in perplexities],
        "relative_standard_deviation": round(statistics.stdev(perplexities) / perplexities[0], 6),
        "mean_difference_of_losses": round(statistics.mean(apart), 5),
    }


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a folder")
    parser.add_argument("--test", type=Path, required=True, help="wiki.test.raw")
    parser.add_argument("--windows", type=int, default=8, help=f"of {LENGTH} tokens")
    parser.add_argument("--seeds", type=int, default=4, help="changed copies of each model")
    arguments = parser.parse_args()
    models = [Model(path.name, str(path), read_config(path, trust_remote_code=False)) for path in arguments.models]
    text = read_text(arguments.test, None, TextProtocol.STREAM)
    rows = {}
    for model in models:
        ids = shared_windows(text, [model], arguments.windows, LENGTH).ids
        rows[model.name] = row(model, ids, arguments.seeds)
        print(model.name, rows[model.name], flush=True)
    write_result("rounding_noise", "python -m benchmarks.rounding_noise MODEL... --test wiki.test.raw", {"rows": rows})


if __name__ == "__main__":
    main()
