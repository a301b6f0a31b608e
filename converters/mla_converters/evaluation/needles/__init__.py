"""A task of long contexts in lm-evaluation-harness's format: find facts that are hidden in real text."""
