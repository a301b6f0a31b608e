"""vLLM in processes of its own.

This package never imports vLLM outside of such a process, because an engine prints to the standard output and never
gives back everything that it took; both end with its process.

- :mod:`~mla_converters.engines.process`: an engine that measures and scores.
- :mod:`~mla_converters.engines.server`: ``vllm serve``.
"""
