"""Running calibration text through a model layer by layer, with the weights of one layer in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import nn

from mla_converters.checkpoints.shape import has_experts
from mla_converters.checkpoints.source import Source
from mla_converters.latent.attention import gqa_attention
from mla_converters.latent.module import LatentAttention
from mla_converters.latent.moments import LayerMoments
from mla_converters.streaming.whole_model import layer_weights
from mla_converters.support.devices import calibration_autocast, native_bfloat16
from mla_converters.support.logits import scaled_logits
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

ERROR_QUERIES = 256  # queries of each window at which attentions are compared


class Attention(Protocol):
    """An attention: it computes outputs ``[windows, queries, D]`` from normed inputs ``[windows, tokens, D]``.

    The outputs are at ``positions`` ``[queries]``, ascending, on CPU (None: at all tokens).
    """

    def __call__(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor: ...


def sampled_positions(tokens: int, count: int) -> torch.Tensor:
    """At most ``count`` positions, evenly spread over a window and ascending; always with the last one; on CPU."""
    return torch.arange(tokens - 1, -1, -tokens // count).flip(0)


def embed(source: Source, windows: torch.Tensor) -> torch.Tensor:
    """The first layer's input ``[windows, tokens, D]``, float32, for token ids ``[windows, tokens]``."""
    embedded = nn.functional.embedding(windows, source.tensor("model.embed_tokens.weight")).float()
    return embedded * getattr(source.config, "embedding_multiplier", 1.0)


def split_projections(attention: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put three projections of the shapes of ``weights`` in the place of a fused one, on the meta device."""
    del attention.qkv_proj
    for name in ("q_proj", "k_proj", "v_proj"):
        rows, columns = weights[f"{name}.weight"].shape
        bias = f"{name}.bias" in weights
        attention.add_module(name, nn.Linear(columns, rows, bias=bias, device="meta").requires_grad_(False))


class SourceLayer:
    """One layer of the source with its weights; experts stay on disk until they are needed.

    Attributes:
        index: its number.
        freqs: ``[d / 2]`` RoPE frequencies, float32 on ``device``; 0 for what never turns.
        norms: the names of its norms.
        scale: factor on the scores.
        heads, kv_heads, head_dim: ``H``, ``g`` and ``d``.
    """

    def __init__(self, source: Source, index: int, module: nn.Module, device: str) -> None:
        self.index = index
        self.freqs = source.frequencies(index).to(device)
        self.norms = source.family.norms
        self.scale = source.softmax_scale
        self.heads = source.config.num_attention_heads
        self.kv_heads = source.config.num_key_value_heads
        self.head_dim = source.head_dim
        self.device = device
        self._source = source
        self._unloaded = module

    @cached_property
    @torch.inference_mode(False)  # as for the module
    def attention_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of its attention in the common layout, under their names below ``self_attn.``.

        They are read when they are needed, because a search passes over most layers.
        """
        return self._source.attention_weights(self.index)

    @cached_property
    # Never in inference mode, even if the first caller is, because a refit's gradient passes through the MLP.
    @torch.inference_mode(False)
    def _module(self) -> nn.Module:
        """transformers' layer with its weights, which are loaded when calibration text first runs through it."""
        module = self._unloaded.requires_grad_(False)  # before loading: the attention's may be inference tensors
        if self._source.family.fused_qkv:
            split_projections(module.self_attn, self.attention_weights)
        weights = {f"self_attn.{name}": tensor for name, tensor in self.attention_weights.items()}
        weights |= _other_weights(self._source, self.index, module, self.device)
        module.load_state_dict(
            {name: tensor.to(self.device, _kept_dtype(name, tensor, self.device)) for name, tensor in weights.items()},
            assign=True,
        )
        return module.eval()

    @property
    def has_experts(self) -> bool:
        """Whether its MLP is a mixture of experts."""
        return has_experts(self._module)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The attention's input: the layer's input ``[windows, tokens, D]`` after its norm."""
        return self._normed(self.norms.before_attention, hidden.to(self.device))

    def _normed(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        return x if name is None else getattr(self._module, name)(x)

    def plus(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The residual stream after the attention: ``hidden`` and the attention's output, both
        ``[windows, tokens, D]``."""
        return hidden + self._added(self.norms.after_attention, output)

    def _added(self, norm: str | None, output: torch.Tensor) -> torch.Tensor:
        """What an output adds to the residual stream."""
        return self._normed(norm, output) * self.residual_multiplier

    @property
    def residual_multiplier(self) -> float:
        """Factor on everything that is added to the residual stream."""
        return getattr(self._module, "residual_multiplier", 1.0)

    def _over_heads(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Normalise queries or keys ``[windows, tokens, heads, d]``, each head or all together."""
        if not self.norm_over_heads:
            return norm(x)
        return norm(x.flatten(-2)).view(x.shape)

    @property
    def norm_over_heads(self) -> bool:
        """Whether QK-norm is of all heads together."""
        return self._source.family.qk_norm == "all"

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Queries ``[windows, H, tokens, d]`` of normed inputs, after QK-norm and before RoPE."""
        attention = self._module.self_attn
        q = attention.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return (q if self.qk_norm_eps is None else self._over_heads(attention.q_norm, q)).transpose(1, 2)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each ``[windows, g, tokens, d]``, of normed inputs; keys after QK-norm and before RoPE."""
        attention = self._module.self_attn
        k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (attention.k_proj, attention.v_proj))
        k = k if self.qk_norm_eps is None else self._over_heads(attention.k_norm, k)
        return k.transpose(1, 2), v.transpose(1, 2)

    @property
    def qk_norm_eps(self) -> float | None:
        """``eps`` of the norm of queries and keys; None for a model without QK-norm."""
        norm = getattr(self._module.self_attn, "k_norm", None)
        return None if norm is None else norm.variance_epsilon

    def attend(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The source's attention, an :class:`Attention`."""
        q = self.queries(x if positions is None else x[:, positions])
        return self.output(gqa_attention(q, *self.keys_values(x), self.freqs, self.scale, positions))

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to the residual stream ``[windows, tokens, D]`` after the attention."""
        x = self._normed(self.norms.before_mlp, hidden.to(self.device))
        with calibration_autocast(self.device):
            return self._added(self.norms.after_mlp, self._module.mlp(x))

    def output(self, values: torch.Tensor) -> torch.Tensor:
        """The attention's output ``[windows, queries, D]`` from the heads' outputs ``[windows, H, queries, d]``."""
        return self._module.self_attn.o_proj(values.transpose(1, 2).flatten(2))

    def converted(
        self,
        weights: dict[str, torch.Tensor],
        cache_format: CacheFormat | None = None,
        hidden: torch.Tensor | None = None,
    ) -> LatentAttention:
        """The attention with converted projections, an :class:`Attention`.

        Args:
            weights: the projections.
            cache_format: the packed format of its cache; None if nothing is rounded.
            hidden: ``[windows, tokens, D]``, inputs of the layer on which the mean is measured that packing takes out;
                None if ``weights`` hold the mean, or the format takes none out.
        """
        attention = LatentAttention(
            weights,
            self.heads,
            self.scale,
            self.device,
            qk_norm_eps=self.qk_norm_eps,
            norm_over_heads=self.norm_over_heads,
            cache_format=cache_format,
        )
        if hidden is not None:
            attention.measure_mean(self.normed(hidden))
        return attention

    @torch.inference_mode()
    def moments(self, hidden: torch.Tensor, first: int = 0) -> LayerMoments:
        """Moments of keys and values over the inputs ``[windows, tokens, D]``, from token ``first`` of each on."""
        moments = LayerMoments(self.kv_heads, self.head_dim, self.device)
        for batch in hidden.split(1):
            with calibration_autocast(self.device):
                k, v = self.keys_values(self.normed(batch))
            moments.add(*(x[:, :, first:].transpose(1, 2).flatten(2).float() for x in (k, v)))
        return moments

    @torch.inference_mode()
    def comparison(self, hidden: torch.Tensor) -> Callable[[Attention], float]:
        """A function that gives the error of an attention on some tokens of the inputs ``[windows, tokens, D]``.

        The error is the squared difference from the source's output, divided by the square of the source's output.
        """
        x = self.normed(hidden)
        positions = sampled_positions(x.shape[1], ERROR_QUERIES)

        @torch.inference_mode()
        def output(attention: Attention) -> torch.Tensor:
            with calibration_autocast(self.device):
                return attention(x, positions).float()

        expected = output(self.attend)
        size = expected.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return lambda attention: ((output(attention) - expected).square().sum() / size).item()

    @torch.inference_mode()
    def add_attention(self, hidden: torch.Tensor, attention: Attention) -> None:
        """First half of the layer: add the attention's output to ``hidden`` ``[windows, tokens, D]``, in place."""
        self._add(hidden, (attention(self.normed(batch)) for batch in hidden.split(1)))

    @torch.inference_mode()
    def add_projected(self, hidden: torch.Tensor, read: list[torch.Tensor], projection: nn.Module) -> None:
        """The same if what the output ``projection`` reads in each window is known, ``[1, tokens, H * d]``."""
        self._add(hidden, (projection(heads.to(self.device)) for heads in read))

    def _add(self, hidden: torch.Tensor, outputs: Iterable[torch.Tensor]) -> None:
        """Add outputs ``[1, tokens, D]``, each of which is computed when it is added."""
        with calibration_autocast(self.device):
            for batch, output in zip(hidden.split(1), outputs, strict=True):
                batch += self._added(self.norms.after_attention, output).to(batch)

    @torch.inference_mode()
    def add_mlp(self, hidden: torch.Tensor) -> None:
        """Second half of the layer: add the MLP's output to ``hidden`` ``[windows, tokens, D]``, in place."""
        # Experts get all windows at once, because each call reads them from disk.
        for batch in hidden.split(len(hidden) if self.has_experts else 1):
            batch += self.mlp(batch).to(batch)

    def advance(self, hidden: torch.Tensor, attention: Attention) -> None:
        """Replace the layer's input ``[windows, tokens, D]`` by its output, in place."""
        self.add_attention(hidden, attention)
        self.add_mlp(hidden)


def _kept_dtype(name: str, tensor: torch.Tensor, device: str) -> torch.dtype:
    """The dtype of a weight in memory: float32, except that matrices of an MLP are bfloat16 if autocast is on.

    Autocast would convert them to bfloat16 at each use.
    """
    converted = name.startswith("mlp.") and tensor.dim() == 2 and native_bfloat16(device)
    return torch.bfloat16 if converted else torch.float32


def _other_weights(source: Source, index: int, module: nn.Module, device: str) -> dict[str, torch.Tensor]:
    """All tensors of a layer except those of its attention, see :func:`layer_weights`."""
    read = partial(source.layer_tensor, index)
    return layer_weights(source.other_names(index), read, source.family.experts, module, device)


@torch.inference_mode()
def logits(source: Source, hidden: list[torch.Tensor], device: str) -> Iterator[torch.Tensor]:
    """The source's logits ``[..., vocabulary]``, float32, for each output ``[..., D]`` of the last layer."""
    norm = source.skeleton().model.norm
    norm.load_state_dict({"weight": source.tensor("model.norm.weight").to(device, torch.float32)}, assign=True)
    tied = source.config.tie_word_embeddings
    head = source.tensor("model.embed_tokens.weight" if tied else "lm_head.weight").to(device, torch.float32)
    for states in hidden:
        with calibration_autocast(device):
            yield scaled_logits(nn.functional.linear(norm(states.to(device)), head).float(), source.config)


def source_layers(source: Source, device: str, first: int = 0) -> Iterator[SourceLayer]:
    """The layers of the source in order, from number ``first`` on. Each is dropped when the next one is asked for."""
    for index, module in list(enumerate(source.skeleton().model.layers))[first:]:
        yield SourceLayer(source, index, module, device)
        module.to("meta")
