"""``python -m mla_converters`` is ``vllm-mla``."""

from mla_converters.cli.main import main

main()
