"""The attention backend of one layer without a model, for tests and benchmarks. No server imports this package.

- :mod:`~vllm_mla_plugin.testing.layer`: sizes, a random cache, and attention in float64 to compare with.
- :mod:`~vllm_mla_plugin.testing.cpu`: the backend on a CPU.
- :mod:`~vllm_mla_plugin.testing.gpu`: the backends on a GPU, this plugin's and vLLM's.
"""
