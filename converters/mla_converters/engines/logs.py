"""The log of a vLLM process that failed: which of its lines tells why."""

import re

EXCEPTION = re.compile(r"\b[\w.]*(?:Error|Exception): .+")
ELSEWHERE = "root cause"  # "See root cause above", says an exception that vLLM raises because another process failed


def last_words(log: str) -> str:
    """The last exception and its reason or, if the log has none, the last line that is not empty."""
    exceptions = [match[0].strip() for match in EXCEPTION.finditer(log) if ELSEWHERE not in match[0]]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (exceptions or lines or ["none"])[-1]


def with_cause(reason: str, log: str) -> str:
    """The reason of a failure, after what the log says if the reason only points there."""
    return f"{last_words(log)} ({reason})" if ELSEWHERE in reason else reason
