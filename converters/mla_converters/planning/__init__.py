"""What a conversion would give and cost, from ``config.json`` alone.

:func:`mla_converters.planning.plan.plan` is the Python API behind ``vllm-mla plan``.
"""
