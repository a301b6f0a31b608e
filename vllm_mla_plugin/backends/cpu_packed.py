"""MLA on CPU from a packed cache: every token is packed once, and attended as it is packed, new ones too."""

import ctypes
from typing import Any

import torch
from torch import nn

from vllm_mla_plugin.backends.cpu import AnySizeCPUMLABackend, AnySizeCPUMLAImpl
from vllm_mla_plugin.backends.cpu_kernel import DecodeKernel, compile_kernel, compile_packing
from vllm_mla_plugin.backends.cpu_requests import Prefills
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise

STEP = 32
"""Positions from one coarse turn of the rotary keys' mean to the next; ``Means::STEP`` of ``cpu_rows.h``."""
LANES = 16
"""Floats of a vector, as in ``cpu_numbers.h``."""


def mean_table(mean: torch.Tensor, freqs: torch.Tensor, positions: int) -> torch.Tensor:
    """What the kernels compute :func:`~vllm_mla_plugin.latent_packing.mean_at` from, for each token anew.

    The mean turned by ``STEP * a + b`` positions is the mean turned by ``b``, turned by ``STEP * a``: two small tables
    instead of one as large as a sequence's cache.

    Args:
        mean: ``[2, latent + rope]``.
        freqs: ``[rope / 2]``.
        positions: how many there are at most.

    Returns:
        Float32, one dimension: what ``struct Means`` of ``cpu_rows.h`` lists.
    """
    latent = mean.shape[-1] - 2 * len(freqs)
    others = torch.stack((mean[1], mean[1]))
    fine = mean_at(others, freqs, torch.arange(STEP))[:, latent:].unflatten(-1, (2, -1))
    angles = STEP * torch.arange(positions // STEP + 1)[:, None].double() * freqs.double()
    coarse = torch.stack((angles.cos(), angles.sin()), dim=1).float()
    fine, coarse = (torch.nn.functional.pad(x, (0, -len(freqs) % LANES)) for x in (fine, coarse))
    return torch.cat([part.flatten() for part in (mean[0] - mean[1], mean[1, :latent], fine, coarse)]).contiguous()


class Packing:
    """Packs tokens into rows, and reads them back, for one layer.

    Args:
        format: of the rows.
        dtype: of the model.
        mean: ``[2, latent + rope]`` that the numbers of the rows lack, or None.
        freqs: ``[rope / 2]``.
        positions: how many there are at most.
    """

    def __init__(
        self, format: CacheFormat, dtype: torch.dtype, mean: torch.Tensor | None, freqs: torch.Tensor, positions: int
    ) -> None:
        self.format, self.dtype, self.mean, self.freqs = format, dtype, mean, freqs
        self.table = None if mean is None else mean_table(mean, freqs, positions)
        self.library = compile_packing(format, dtype)
        if self.library is not None:
            self.library.pack.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
            self.library.unpack.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64]
            self.library.pack.restype = self.library.unpack.restype = None

    def pack(self, latent: torch.Tensor, k_rope: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Write tokens without their mean.

        Args:
            latent: ``[tokens, latent]``.
            k_rope: ``[tokens, rope]``, rotated.
            rows: ``[anything, bytes]`` uint8, contiguous; written.
            slots: ``[tokens]`` int64, the row of each token; below 0, it is not written.
        """
        if self.library is None:
            there = slots >= 0
            rows[slots[there]] = quantise(torch.cat((latent, k_rope), dim=-1)[there], self.format)
            return
        if latent.stride(1) != 1 or k_rope.stride(1) != 1:
            latent, k_rope = latent.contiguous(), k_rope.contiguous()
        tensors = (latent, k_rope, slots.contiguous(), rows)
        self.library.pack(*(x.data_ptr() for x in tensors), len(slots), latent.stride(0), k_rope.stride(0))

    def unpack(self, rows: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read tokens with their mean.

        Args:
            rows: ``[anything, bytes]`` uint8, contiguous.
            slots: ``[tokens]``, the row of each token.
            positions: ``[tokens]`` in their sequences.

        Returns:
            ``[tokens, latent + rope]``.
        """
        slots, positions = slots.long().contiguous(), positions.long().contiguous()
        if self.library is None:
            numbers = dequantise(rows[slots], self.format)
            if self.mean is not None:
                numbers += mean_at(self.mean, self.freqs, positions)
            return numbers.to(self.dtype)
        output = torch.empty(len(slots), sum(self.format.sizes), dtype=self.dtype)
        table = None if self.table is None else self.table.data_ptr()
        self.library.unpack(
            rows.data_ptr(), slots.data_ptr(), positions.data_ptr(), table, output.data_ptr(), len(slots)
        )
        return output


class PackedCPUMLABackend(AnySizeCPUMLABackend):
    """This plugin's CPU backend for packed rows."""

    @staticmethod
    def get_impl_cls() -> type["PackedCPUMLAImpl"]:
        return PackedCPUMLAImpl


class PackedCPUMLAImpl(AnySizeCPUMLAImpl):
    """Attention on packed latents.

    New tokens are attended as they are packed. Otherwise a prompt would be answered differently the second time, when
    its tokens come from the cache.

    Args:
        cache_format, cache_mean, rope_freqs, max_position: as
            :class:`vllm_mla_plugin.packed_attention.PackedMLAAttention` says.
        arguments: as for vLLM's implementation.
    """

    packing: Packing

    def __init__(
        self,
        *,
        cache_format: CacheFormat,
        cache_mean: nn.Parameter | None,
        rope_freqs: nn.Parameter,
        max_position: int,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.cache_format, self.max_position = cache_format, max_position
        self.cache_mean, self.rope_freqs = cache_mean, rope_freqs

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        mean = None if self.cache_mean is None else self.cache_mean.data
        self.packing = Packing(self.cache_format, act_dtype, mean, self.rope_freqs.data, self.max_position)
        super().process_weights_after_loading(act_dtype)

    def make_kernel(self, dtype: torch.dtype) -> DecodeKernel | None:
        library = compile_kernel(self.num_heads, *self.cache_format.sizes, dtype, self.cache_format)
        return None if library is None else DecodeKernel(library, self.kv_lora_rank, self.scale, self.packing.table)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        skip_scale: bool = False,
    ) -> None:
        """Pack new tokens into the cache.

        Args:
            kv_c_normed: ``[tokens, latent]`` without the mean.
            k_pe: ``[tokens, 1, rope]``, rotated, without the mean.
            kv_cache: ``[blocks, block_size, bytes]`` uint8.
            slot_mapping: ``[tokens]``, where they go, counted in tokens; below 0, nowhere.
            skip_scale: of no meaning here; vLLM gives it from 0.33 on.
        """
        if kv_cache.numel():
            slots = slot_mapping.flatten().long()
            rows = kv_cache.view(-1, self.cache_format.bytes_per_token)
            self.packing.pack(kv_c_normed, k_pe.squeeze(1), rows, slots)

    def read_new(
        self, latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, requests: Prefills
    ) -> torch.Tensor:
        contexts = requests.contexts
        return self.read_range(cache, requests, contexts, contexts + requests.starts.diff())

    def read_cached(self, cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.packing.unpack(cache.view(-1, cache.shape[-1]), slots, positions)

    def _context_in_place(self, cache: torch.Tensor, requests: Prefills) -> tuple[torch.Tensor, torch.Tensor]:
        return self._context(cache, requests)  # there are no numbers in place
