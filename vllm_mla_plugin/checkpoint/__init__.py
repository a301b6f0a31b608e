"""The contract between converter and plugin: what a checkpoint with MLA is, and which backends serve it.

It imports neither vLLM nor the converter, which both import it.
"""
