"""The log of a vLLM process that failed: which of its lines tells why."""

import re

# "Value error, " begins what pydantic finds wrong with vLLM's configuration; " [type=" begins its details.
EXCEPTION = re.compile(r"\b(?:[\w.]*(?:Error|Exception): |Value error, ).+?(?= \[type=|$)")
# vLLM logs exceptions as warnings, too, and goes on; 0.30 logs as an error that it was asked for no tokenizer.
HARMLESS = re.compile(" WARNING |skip_tokenizer_init")
ELSEWHERE = "root cause"  # "See root cause above", says an exception that vLLM raises because another process failed


def last_words(log: str) -> str:
    """The last exception and its reason or, if the log has none, the last line that is not empty."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    grave = [line for line in lines if not HARMLESS.search(line) and ELSEWHERE not in line]
    exceptions = [match[0] for line in grave if (match := EXCEPTION.search(line))]
    return (exceptions or lines or ["none"])[-1]


def with_cause(reason: str, log: str) -> str:
    """The reason of a failure, after what the log says if the reason only points there."""
    return f"{last_words(log)} ({reason})" if ELSEWHERE in reason else reason
