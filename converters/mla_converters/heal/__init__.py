"""Training a converted model; :func:`mla_converters.heal.run.heal` is the Python API behind ``vllm-mla heal``."""
