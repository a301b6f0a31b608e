"""What each of several GPUs caches: of the source and of a conversion, by how the GPUs share the work.

vLLM's ways to share it, for N GPUs:

- Tensor parallel: each GPU has a part of the heads. It keeps the KV heads of its part, at least one, for all tokens. A
  latent belongs to all heads, so each GPU keeps all of it.
- Decode context parallel: GPUs that would keep the same numbers share out the tokens instead.
- Data-parallel attention: each GPU has all heads, and keeps the tokens of its own requests. Only experts are shared
  out. All other weights lie on every GPU, and leave less memory for the cache.
"""

import shlex
from dataclasses import dataclass, replace

from mla_converters.checkpoints.shape import PlannedSource, Shape
from mla_converters.checkpoints.vllm_caches import FP8, INT4, VllmCache, vllm_caches
from mla_converters.planning.layouts import Candidate
from mla_converters.reports.plan import GpuCache, PlannedGpus, Way
from vllm_mla_plugin.checkpoint.layouts import GPUS

UNTRIED = "Decode context parallel has not been run on GPUs with a converted model yet: check its answers there."


@dataclass(frozen=True)
class Cached:
    """What one cache takes on each GPU.

    Attributes:
        model: ``source`` or ``conversion``.
        options: that ask ``convert`` for the cache, or ``vllm serve`` for one of the source.
        row: bytes of a token where a GPU has all heads.
        weights: bytes of the model's weights.
        tensor: bytes of a token on each GPU with tensor parallel; None where vLLM cannot share the heads.
        sharing: by how many GPUs decode context parallel shares each of these bytes; 1 where it does not.
    """

    model: str
    options: tuple[str, ...]
    row: int
    weights: int
    tensor: int | None
    sharing: int


def plan_gpus(source: PlannedSource, conversions: dict[Candidate, int], gpus: int, memory: int) -> PlannedGpus:
    """Compare the ways.

    Args:
        source: the model.
        conversions: the conversions to compare, with the bytes of their weights.
        gpus: how many GPUs there are.
        memory: bytes of each GPU for the cache, with tensor parallel.
    """
    caches = [
        *_source_caches(source, gpus),
        *(_converted(source, each, weights, gpus) for each, weights in conversions.items() if _on_gpus(each, source)),
    ]
    found = [placed for cache in caches for placed in _ways(cache, source.shape, gpus, memory)]
    return PlannedGpus(gpus=gpus, memory_bytes=memory, ways=found, recommended=_recommend(found, gpus))


def _on_gpus(candidate: Candidate, source: PlannedSource) -> bool:
    return any(gpu in GPUS for gpu in candidate.backends(source.cache_dtype))


def _source_caches(source: PlannedSource, gpus: int) -> list[Cached]:
    shape = source.shape
    plain = VllmCache("auto", lambda head_dim: 2 * source.cache_bytes * head_dim, lambda _: GPUS)
    formats = [plain, *(cache for cache in vllm_caches(shape) if cache.name in (FP8, INT4))]
    heads = _kv_heads_of_a_gpu(shape, gpus)
    found = []
    for cache in formats:
        # vLLM's backend for this format does not share out tokens.
        sharing = 1 if cache.name == INT4 else _sharing_of_heads(shape, gpus)
        tensor = None if heads is None else cache.token_bytes(replace(shape, kv_heads=heads))
        options = () if cache is plain else ("--kv-cache-dtype", cache.name)
        weights = shape.parameters * shape.weight_bytes
        found.append(Cached("source", options, cache.token_bytes(shape), weights, tensor, sharing))
    return found


def _kv_heads_of_a_gpu(shape: Shape, gpus: int) -> int | None:
    """None where vLLM refuses to share the source's heads: neither number of KV heads and GPUs divides the other."""
    if shape.query_heads % gpus or (shape.kv_heads % gpus and gpus % shape.kv_heads):
        return None
    return max(1, shape.kv_heads // gpus)


def _sharing_of_heads(shape: Shape, gpus: int) -> int:
    """How many GPUs keep the same KV head, if vLLM takes this number for decode context parallel; otherwise 1."""
    same = gpus // shape.kv_heads
    return same if same > 1 and (shape.query_heads // shape.kv_heads) % same == 0 else 1


def _converted(source: PlannedSource, candidate: Candidate, weights: int, gpus: int) -> Cached:
    shape, cache = source.shape, candidate.cache
    packed = cache.format is not None or cache.searched_bytes is not None
    latent = cache.budget.kv_lora_rank
    row = shape.layers * (cache.row_bytes if packed else source.cache_bytes * cache.budget.width)
    # The plugin refuses packed rows, and latents that vLLM's merging kernel does not take.
    sharing = 1 if packed or latent & (latent - 1) else gpus
    tensor = None if shape.query_heads % gpus else row
    return Cached("conversion", candidate.options, row, weights, tensor, sharing)


def _ways(cache: Cached, shape: Shape, gpus: int, memory: int) -> list[GpuCache]:
    """The ways that vLLM takes with a cache."""
    found = []

    def add(way: Way, serve: list[str], per_token: int, tokens: int) -> None:
        found.append(
            GpuCache(
                model=cache.model,
                options=list(cache.options),
                way=way,
                serve_options=serve,
                kv_bytes_per_token=per_token,
                tokens=tokens,
            )
        )

    tensor = ["--tensor-parallel-size", str(gpus)]
    if cache.tensor is not None:
        add(Way.TENSOR, tensor, cache.tensor, memory // cache.tensor)
        if cache.sharing > 1:
            shared = -(-cache.tensor // cache.sharing)
            context = [*tensor, "--decode-context-parallel-size", str(cache.sharing)]
            add(Way.CONTEXT, context, shared, memory // shared)
    experts = shape.expert_parameters * shape.weight_bytes
    left = max(0, memory - (cache.weights - experts) * (gpus - 1) // gpus)
    data = ["--data-parallel-size", str(gpus), *(["--enable-expert-parallel"] if experts else [])]
    add(Way.DATA, data, cache.row, gpus * (left // cache.row))
    return found


def _recommend(found: list[GpuCache], gpus: int) -> str:
    """In a sentence: what holds the most tokens, and how much more that is than the best of the other model."""
    best, other = (
        max((placed for placed in found if placed.model == model), key=lambda placed: placed.tokens, default=None)
        for model in ("conversion", "source")
    )
    if best is None or (other is not None and other.tokens >= best.tokens):
        best, other = other, best
    assert best is not None
    more = ""
    if other is not None and other.tokens:
        more = f", {best.tokens / other.tokens:.2f} times as many as the {_named(other)}"
    converted = best.model == "conversion"
    advice = "" if converted else "convert nothing for the sake of memory, because "
    note = f" {UNTRIED}" if converted and best.way == Way.CONTEXT else ""
    return f"On {gpus} GPUs, {advice}the {_named(best)} holds most: {best.tokens:,} tokens{more}.{note}"


def _named(placed: GpuCache) -> str:
    cache = shlex.join(placed.options) if placed.options else "16 bits"
    return f"{placed.model} ({cache}) with {shlex.join(placed.serve_options)}"
