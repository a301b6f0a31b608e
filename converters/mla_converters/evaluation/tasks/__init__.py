"""Scores of tasks, by lm-evaluation-harness on vLLM.

The harness runs in this process, and asks a model of ours (:mod:`~mla_converters.evaluation.tasks.language_model`),
which passes every request on to vLLM in a process of its own. Both ends are public and have stayed the same over many
versions: the harness's interface for new models, and vLLM's for requests. The harness's own model for vLLM reaches into
parts of vLLM that have moved several times, and would start vLLM in this process; its model for servers gives no
progress and needs a server with a tokenizer of its own.
"""
