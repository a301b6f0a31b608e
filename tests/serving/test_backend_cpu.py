"""The CPU backend compared with attention in float64, for awkward sizes, lengths and pages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.attention import PREFILLS, TOLERANCE, assert_close, check_prefill
from support.commands import convert
from support.engine import VLLM, run_engine, speculative
from support.files import TEXT
from support.models import RandomModel
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform

from vllm_mla_plugin.backends import cpu, cpu_kernel
from vllm_mla_plugin.backends.cpu import AnySizeCPUMLAImpl
from vllm_mla_plugin.backends.cpu_requests import Prefills
from vllm_mla_plugin.testing.cpu import make_impl
from vllm_mla_plugin.testing.layer import Sizes, cached_tokens, make_cache, reference

current_platform.import_kernels()
SIZES = {
    "smollm2-half": Sizes(),
    "deepseek": Sizes(heads=4, latent=512, rope=64, nope=128, v=128, block=128),
    "not-multiples-of-anything": Sizes(heads=13, latent=37, rope=6, nope=80, v=80),
    "one-head": Sizes(heads=1, latent=100, rope=28, nope=48, v=48, block=32),
    "all-rope": Sizes(heads=6, latent=48, rope=96, nope=0, v=32),
    "narrow": Sizes(heads=32, latent=8, rope=4, nope=16, v=16),
}


def check_decode(sizes: Sizes, dtype: torch.dtype, kernel: bool) -> None:
    torch.manual_seed(0)
    lengths = [1, 31, 32, 33, 1024, 1025, 2100, 5]
    impl = make_impl(sizes, dtype)
    assert impl.kernel is not None
    if not kernel:
        impl.kernel = None
    cache, table = make_cache(sizes, lengths, dtype)
    q = torch.randn(len(lengths), sizes.heads, sizes.latent + sizes.rope, dtype=dtype)
    decode = SimpleNamespace(block_table=table, seq_lens=torch.tensor(lengths, dtype=torch.int32))
    parts = q.split([sizes.latent, sizes.rope], dim=-1)
    got, _ = impl.forward_mqa(parts, cache, SimpleNamespace(decode=decode), None)
    for i, length in enumerate(lengths):
        keys = cached_tokens(cache, table[i], length)[:, None].expand(-1, sizes.heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., : sizes.latent], impl.scale)
        assert_close(got[i : i + 1], expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_decode(sizes: str, dtype: torch.dtype) -> None:
    check_decode(SIZES[sizes], dtype, kernel=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_without_compiler(dtype: torch.dtype) -> None:
    check_decode(SIZES["not-multiples-of-anything"], dtype, kernel=False)


def test_decode_of_padding() -> None:
    """Sequences of length 0 pad a batch. Their output is zero, whatever the table holds."""
    sizes, dtype = Sizes(), torch.bfloat16
    impl = make_impl(sizes, dtype)
    cache, table = make_cache(sizes, [20, 1], dtype)
    q = torch.randn(2, sizes.heads, sizes.latent + sizes.rope, dtype=dtype)
    got = impl.kernel(q, cache, table, torch.tensor([20, 0], dtype=torch.int32))
    assert got[0].isfinite().all() and not got[1].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", PREFILLS)
@pytest.mark.parametrize("sizes", ["smollm2-half", "not-multiples-of-anything", "all-rope"])
def test_prefill(sizes: str, case: str, dtype: torch.dtype) -> None:
    check_prefill(SIZES[sizes], dtype, *PREFILLS[case])


@pytest.mark.parametrize("sizes", ["smollm2-half", "not-multiples-of-anything"])
def test_context_that_would_not_fit_expanded(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, keys of requests with earlier context are not expanded."""
    if not cpu.has_extend_kernel(torch.bfloat16):
        pytest.skip("vLLM's kernel does not run on this processor")
    monkeypatch.setattr(cpu, "MAX_EXPANDED_BYTES", 0)
    monkeypatch.setattr(AnySizeCPUMLAImpl, "_expand", None)
    check_prefill(SIZES[sizes], torch.bfloat16, [32, 8, 520, 1500], [200, 40, 1, 31])


def test_runs_of_requests() -> None:
    """Neighbours are attended together if they are of one kind, and if what is expanded for them is not too much."""
    starts = torch.tensor([0, 7, 8, 10, 40, 90, 95], dtype=torch.int32)
    contexts = torch.tensor([0, 900, 800, 60, 50, 10], dtype=torch.int32)
    requests = Prefills(starts, contexts, torch.arange(6)[:, None])
    runs = list(requests.runs(lambda new, cached: cached > 100 * new, most=100))
    assert [tokens for tokens, _, _ in runs] == [slice(0, 7), slice(7, 10), slice(10, 40), slice(40, 95)]
    assert [as_latents for _, _, as_latents in runs] == [False, True, False, False]
    assert [part.starts.tolist() for _, part, _ in runs] == [[0, 7], [0, 1, 3], [0, 30], [0, 50, 55]]
    assert [part.contexts.tolist() for _, part, _ in runs] == [[0], [900, 800], [60], [50, 10]]
    assert [part.block_table.flatten().tolist() for _, part, _ in runs] == [[0], [1, 2], [3], [4, 5]]


def test_each_request_as_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token after much context is attended as latents beside a new prompt, whose keys and values are expanded."""
    if not cpu.has_extend_kernel(torch.bfloat16):
        pytest.skip("vLLM's kernel does not run on this processor")
    calls = []
    for name in ("_extend_latents", "_extend_expanded"):
        method = getattr(AnySizeCPUMLAImpl, name)

        def counted(self, q, new, cache, requests, name=name, method=method):
            calls.append((name, len(q)))
            return method(self, q, new, cache, requests)

        monkeypatch.setattr(AnySizeCPUMLAImpl, name, counted)
    check_prefill(SIZES["smollm2-half"], torch.bfloat16, [2000, 0, 16], [1, 300, 200])
    assert calls == [("_extend_latents", 1), ("_extend_expanded", 500)]


def test_compiler_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If the compiler is missing or fails, there is no kernel, and the reason is given."""
    assert "'no-such-compiler' is not installed" in cpu_kernel.run_compiler(("no-such-compiler",), tmp_path / "x.so")
    problem = cpu_kernel.run_compiler(("g++", "--no-such-option"), tmp_path / "x.so")
    assert problem.startswith("g++ failed: ")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    assert cpu_kernel.compile_kernel(3, 5, 7, torch.float32) is None, "a cache that cannot be written"


def test_platform() -> None:
    """vLLM uses this plugin's platform, which is a subclass of vLLM's CPU platform."""
    assert type(current_platform).__module__ == "vllm_mla_plugin.platform"
    assert current_platform.is_cpu() and isinstance(current_platform, CpuPlatform)


@pytest.mark.engine
@pytest.mark.parametrize("dtypes", [("float32", "fp8"), ("bfloat16", "float16")], ids=str)
def test_cache_dtype(exact: Path, dtypes: tuple[str, str]) -> None:
    """vLLM asks no backend that is given to a layer. On CPUs, the cache has the model's dtype or is refused."""
    own, asked = dtypes
    refusal = f"keeps this cache as auto, {own} here, not as {asked}"
    if VLLM >= (0, 33) and asked == "float16":  # these vLLM refuses itself
        refusal = f'kv_cache_dtype="{asked}" is incompatible with dtype="{own}"'
    with pytest.raises(AssertionError, match=refusal):
        run_engine(exact, [[1, 2, 3]], engine={"dtype": own, "kv_cache_dtype": asked})


@pytest.mark.parametrize("amx", [False, True])
def test_block_size(amx: bool, exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks have the size that is asked for, or 16 tokens. vLLM would make them 16, or 128 on processors with AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    config = EngineArgs(str(exact), dtype="bfloat16").create_engine_config()
    assert config.cache_config.block_size == 16
    config = EngineArgs(str(exact), dtype="bfloat16", block_size=32).create_engine_config()
    assert config.cache_config.block_size == 32


def text_prompts(folder: Path) -> list[list[int]]:
    """Long and short prompts. The first four begin with the same 200 tokens."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    return [*(ids[:200] + ids[300 + i : 340 + i] for i in range(0, 60, 15)), ids[5:500], ids[7:20]]


@pytest.mark.engine
def test_chunked_prefill_and_prefix_caching(half: Path) -> None:
    """Prompts in chunks of 64 tokens, with shared beginnings from the cache, give the same tokens."""
    prompts = text_prompts(half)
    off = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    on = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    plain = run_engine(half, prompts, max_tokens=12, engine=off)
    pieces = run_engine(half, [*prompts, *prompts[:2]], max_tokens=12, engine={**on, "max_num_seqs": 2})
    assert pieces["tokens"] == plain["tokens"] + plain["tokens"][:2]
    assert plain["cached_tokens"] == [0] * len(prompts)
    assert pieces["cached_tokens"][3] >= 192 and pieces["cached_tokens"][-1] >= 224


@pytest.mark.engine
@speculative
def test_speculative_decoding(half: Path) -> None:
    """Checking several guessed tokens of a request at once gives the same tokens."""
    prompts = text_prompts(half)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    plain = run_engine(half, prompts, max_tokens=12)
    guessed = run_engine(half, prompts, max_tokens=12, engine={"speculative_config": speculation})
    assert guessed["tokens"] == plain["tokens"]


@pytest.mark.engine
@speculative
def test_draft_model(tmp_path: Path) -> None:
    """A conversion guesses for its source, which vLLM serves by another backend; and the other way round."""
    source = RandomModel(heads=6, kv_heads=3, head_dim=32, hidden=192).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    prompts = [list(range(5, 45)), [7], list(range(100, 117))]
    job: dict[str, Any] = {"max_tokens": 12, "no_tokenizer": True}
    plain = run_engine(source, prompts, engine={"max_model_len": 256}, **job)
    for model, draft in ((source, out), (out, source)):
        speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
        engine = {"max_model_len": 256, "speculative_config": speculation}
        assert run_engine(model, prompts, engine=engine, **job)["tokens"] == plain["tokens"]
