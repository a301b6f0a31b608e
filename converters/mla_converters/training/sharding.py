"""Tensors that FSDP2 shards over processes: sharding a model's layers, and putting whole tensors together."""

import torch
from torch import nn
from torch.distributed import get_world_size, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard


def shard_model(model: nn.Module, in_turn: list[nn.Module], dtype: torch.dtype, device: str) -> None:
    """Shard a model over all processes: each of ``in_turn`` is gathered when it runs, and the rest stays gathered.

    Args:
        model: equal in all processes; changed in place.
        in_turn: modules in it that are gathered one at a time.
        dtype: in which weights are gathered and multiplied; gradients are summed in float32.
        device: the kind of device to which the weights go.
    """
    mesh = init_device_mesh(device, (get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for module in (*in_turn, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=_placement)


def _placement(weight: nn.Parameter) -> Shard | None:
    """Shard along the first dimension; along another if the first one is shorter than the number of processes.

    A block of a projection has its heads in the first dimension. There may be fewer heads than processes, and then some
    processes would hold nothing.
    """
    processes = get_world_size()
    if weight.shape[0] >= processes:
        return None
    even = [dim for dim, size in enumerate(weight.shape) if size and size % processes == 0]
    return Shard(even[0]) if even else None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is whole in this process. If it is sharded, all processes must ask for it together."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
