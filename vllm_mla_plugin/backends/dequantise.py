"""Plain weights from a quantised ``kv_b_proj``, which MLA takes apart instead of multiplying by it as a whole."""

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


def dequantise(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Turn a quantised linear layer of vLLM, once its weights are processed, into an unquantised one.

    vLLM's own function for this reads the device of the quantised weight, which vLLM's CPU kernel for int8 (0.32) has
    given up by then. The unquantised layer also keeps prefill and decode the same: decode multiplies by the parts.

    Args:
        layer: unquantised layers stay as they are.
        dtype: of the plain weight.

    Raises:
        ValueError: the layer quantises its input with a scale that is fixed in the checkpoint. The weights cannot be
            read back through such a layer.
    """
    method = getattr(layer, "quant_method", None)
    if method is None or isinstance(method, UnquantizedLinearMethod):
        return
    if getattr(layer, "input_scale", None) is not None:
        raise ValueError(
            "kv_b_proj is quantised with a fixed scale of its activations, which MLA on CPUs cannot use: quantise with "
            "dynamic activations, or put kv_b_proj into the list of ignored layers."
        )
    # Kernels pack weights in ways of their own, but all multiply. A row of the identity survives dynamic quantisation
    # exactly, because its largest number is its scale.
    eye = torch.eye(layer.input_size_per_partition, dtype=dtype)
    weight = method.apply(layer, eye, bias=None).to(dtype).T.contiguous()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.quant_method = UnquantizedLinearMethod()
    layer.quant_method.process_weights_after_loading(layer)
