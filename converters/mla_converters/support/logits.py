"""Logits as a model gives them."""

import torch
from transformers import PretrainedConfig


def scaled_logits(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """What a model makes of its head's output; Granite divides it."""
    return logits / getattr(config, "logits_scaling", 1.0)
