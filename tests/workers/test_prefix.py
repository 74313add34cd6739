"""Page keys, and the engine finding pages by them."""

import pytest

from model.sampling_params import SamplingParams
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel
from workers.prefix import PrefixHasher
from workers.sequence import Request, Token

SECRET = b"0123456789abcdef"


def keys_of(tokens: list[int], tenant: str = "t", secret: bytes = SECRET) -> list[bytes]:
    keys: list[bytes] = []
    PrefixHasher(secret).extend(keys, tenant, tokens, len(tokens) // 64)
    return keys


def test_a_key_depends_on_everything_before_it_and_on_whose_it_is() -> None:
    tokens = list(range(200))
    keys = keys_of(tokens)
    assert len(keys) == len(set(keys)) == 3
    assert keys_of([9, *tokens[1:]])[2] != keys[2]
    assert keys_of([*tokens[:128], 9, *tokens[129:]])[:2] == keys[:2]
    assert not set(keys_of(tokens, tenant="u")) & set(keys)
    assert not set(keys_of(tokens, secret=b"another secret..")) & set(keys)


def test_a_chain_can_be_extended_page_by_page() -> None:
    tokens = list(range(256))
    keys: list[bytes] = []
    hasher = PrefixHasher(SECRET)
    for num_pages in (1, 1, 3, 4):
        hasher.extend(keys, "t", tokens, num_pages)
    assert keys == keys_of(tokens)


def answer(
    engine: Engine, prompt_ids: tuple[int, ...], tenant: str = "", max_tokens: int = 32
) -> list[Token]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    engine.add(Request("r", prompt_ids, params, tenant=tenant))
    tokens: list[Token] = []
    while not engine.is_idle:
        tokens += engine.step()
    engine.pool.check_idle()
    return tokens


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_second_turn_starts_on_pages_that_the_first_one_made(
    demo: LocalModel, oracle, num_drafts: int
) -> None:
    prompt = oracle["lookup_300"].prompt_ids
    engine = demo.engine(EngineConfig(num_drafts=num_drafts), 2048)
    first = answer(engine, prompt, max_tokens=100)
    assert {token.num_prompt_cached for token in first} == {0}
    turn_two = (*prompt, *(token.token_id for token in first), 8175, 379)
    second = answer(engine, turn_two)
    # The last token drawn was never run, so its page may lack one; all pages before are found.
    assert {token.num_prompt_cached for token in second} == {(len(prompt) + 99) // 64 * 64}
    alone = answer(demo.engine(EngineConfig(), 2048), turn_two)
    assert [token.token_id for token in second] == [token.token_id for token in alone]


def test_the_last_token_of_a_prompt_always_runs(demo: LocalModel, oracle) -> None:
    prompt = oracle["lookup_300"].prompt_ids[:256]
    engine = demo.engine(EngineConfig(), 1024)
    first = answer(engine, prompt)
    again = answer(engine, prompt)
    assert again[0].num_prompt_cached == 192
    assert [token.token_id for token in again] == [token.token_id for token in first]


def test_tenants_share_nothing(demo: LocalModel, oracle) -> None:
    engine = demo.engine(EngineConfig(), 1024)
    answer(engine, oracle["lookup_300"].prompt_ids, tenant="a")
    assert answer(engine, oracle["lookup_300"].prompt_ids, tenant="b")[0].num_prompt_cached == 0
    assert answer(engine, oracle["lookup_300"].prompt_ids, tenant="a")[0].num_prompt_cached == 256


def test_cached_pages_make_room_for_running_sequences(demo: LocalModel, oracle) -> None:
    engine = demo.engine(EngineConfig(), 448)  # seven pages; an answer to this prompt takes six
    prompt = oracle["lookup_300"].prompt_ids
    answer(engine, prompt)
    other = answer(engine, tuple(reversed(prompt)))
    assert other[0].num_prompt_cached == 0
    assert answer(engine, prompt)[0].num_prompt_cached < 256
