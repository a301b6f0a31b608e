"""The real OpenAI-compatible server with a converted model, started only with flags that a user would give."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from support.files import TEXT

from mla_converters.engines.server import serve
from scripts import demo

pytestmark = pytest.mark.server

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A running server, with its URL, log, model name and an OpenAI client."""
    log = tmp_path_factory.mktemp("server") / "log"
    # float32, because 16-bit rounding depends on the other requests in a batch, and may change the likeliest token.
    options = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")
    with serve(exact, log, *options, environment={"VLLM_CPU_KVCACHE_SPACE": "1"}) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield SimpleNamespace(url=url, log=log, model=str(exact), client=client)


def complete(served: SimpleNamespace, prompt: object, **options: object) -> openai.types.Completion:
    options = {"temperature": 0, "max_tokens": 16} | options
    return served.client.completions.create(model=served.model, prompt=prompt, **options)


def test_chat_makes_sense(served: SimpleNamespace) -> None:
    """The chat template was carried over."""
    assert "Paris" in demo.chat(served.url, served.model)
    assert "KV cache size" in served.log.read_text()


def test_stream_is_the_answer(served: SimpleNamespace) -> None:
    whole = complete(served, TEXT[:200]).choices[0].text
    chunks = [chunk.choices[0].text for chunk in complete(served, TEXT[:200], stream=True)]
    assert len(chunks) > 8
    assert "".join(chunks) == whole


def test_logprobs_and_several_answers(served: SimpleNamespace) -> None:
    """Each of n sampled answers has log-probabilities of its tokens. The same seed gives the same answers."""
    options = {"n": 3, "temperature": 1.0, "seed": 1, "logprobs": 2, "max_tokens": 8}
    first, again = (complete(served, TEXT[:200], **options).choices for _ in range(2))
    assert len({choice.text for choice in first}) == 3
    assert [choice.text for choice in first] == [choice.text for choice in again]
    assert all(len(choice.logprobs.token_logprobs) == 8 for choice in first)
    assert all(value <= 0 for choice in first for value in choice.logprobs.token_logprobs)


def test_structured_output(served: SimpleNamespace) -> None:
    answer = served.client.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "Is Paris a capital? Answer in JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
        temperature=0,
        max_tokens=60,
    )
    content = json.loads(answer.choices[0].message.content)
    assert content.keys() == {"city", "capital"}
    assert isinstance(content["capital"], bool)


def test_stop_string(served: SimpleNamespace) -> None:
    whole = complete(served, "one, two, three,", max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    choice = complete(served, "one, two, three,", max_tokens=24, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("prompt", ["", [1] * 3000], ids=["empty", "longer than the context"])
def test_bad_prompts_are_the_clients_fault(served: SimpleNamespace, prompt: object) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(served, prompt)


def test_longest_prompt(served: SimpleNamespace) -> None:
    """A prompt of 2,047 tokens in a context of 2,048 leaves room for one token."""
    answer = complete(served, [1] + [500] * 2046, max_tokens=1)
    assert answer.usage.completion_tokens == 1


def test_client_that_leaves(served: SimpleNamespace) -> None:
    """Clients that leave in the middle of a stream do not change the tokens of the others."""
    alone = complete(served, TEXT[:300], max_tokens=32).choices[0].text

    def leave(i: int) -> None:
        stream = complete(served, TEXT[i : i + 100], stream=True, max_tokens=1000, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave, i) for i in range(6)]
        staying = [pool.submit(complete, served, TEXT[:300], max_tokens=32) for _ in range(2)]
        assert all(future.result().choices[0].text == alone for future in staying)
        for future in leaving:
            future.result()
    assert complete(served, TEXT[:300], max_tokens=32).choices[0].text == alone
