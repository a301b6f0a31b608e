"""The mean that packed rows lack, as GPU kernels read it."""

from typing import NamedTuple, Self

import torch

from vllm_mla_plugin.latent_packing import mean_at


class Means(NamedTuple):
    """Tables of one layer, all float32.

    The rotary key's mean is turned by the token's position. Turned by ``step * a + b`` positions, it is the mean turned
    by ``b``, turned by ``step * a``: two small tables, instead of one with a row for each position.

    Attributes:
        shares: ``[2, latent + rope]``: the mean of all tokens but the first; and by how much the first token's differs.
        fine: ``[step, rope]``, the rotary key's mean turned by ``0 ... step - 1`` positions.
        coarse: ``[steps, 2, rope / 2]``, cosines and sines of ``step * a`` positions.
    """

    shares: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor

    @property
    def step(self) -> int:
        """Positions from one coarse turn to the next."""
        return len(self.fine)

    @classmethod
    def of(cls, mean: torch.Tensor, freqs: torch.Tensor, positions: int, step: int) -> Self:
        """The tables, on the mean's device.

        Args:
            mean: ``[2, latent + rope]``, of the first token and of all others.
            freqs: ``[rope / 2]``, radians per position.
            positions: how many there are at most.
            step: as above.
        """
        mean = mean.float()
        others = torch.stack((mean[1], mean[1]))
        latent = mean.shape[-1] - 2 * len(freqs)
        fine = mean_at(others, freqs, torch.arange(step, device=mean.device))[:, latent:]
        starts = step * torch.arange(positions // step + 1, device=mean.device)
        angles = starts[:, None].double() * freqs.double()
        coarse = torch.stack((angles.cos(), angles.sin()), dim=1).float()
        return cls(torch.stack((mean[1], mean[0] - mean[1])), fine.contiguous(), coarse.contiguous())
