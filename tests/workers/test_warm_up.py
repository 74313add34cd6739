"""What an engine does before its first request: steps are recorded when they come, and nothing else moves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.graphs import MOST_RECORDED, Bucket, DecodeGraphs
from model.inputs import PAGE_SIZE
from model.sampling_params import SamplingParams
from tests.model.fused.test_fused import fused, new_cache
from tests.model.test_graphs import again
from workers.engine import Engine, EngineConfig
from workers.sequence import Request
from workers.warm_up import WarmUp, likely_shapes

NUM_TOKENS = 320  # five pages: up to five sequences


class Recorder:
    """In place of CUDA graphs; counts them."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        replay, result = again(run)
        self.rows.append(len(result))
        return replay, result


def engine_of(config: EngineConfig) -> tuple[Engine, Recorder]:
    recorder, cache = Recorder(), new_cache(fused(), NUM_TOKENS)
    return Engine(fused(), cache, config, graphs=DecodeGraphs(fused(), cache, recorder)), recorder


def answer(engine: Engine, prompt_ids: tuple[int, ...]) -> list[int]:
    for number in range(3):
        params = SamplingParams(max_tokens=6, seed=number, temperature=number / 2, ignore_eos=True)
        engine.add(Request(str(number), prompt_ids[: 20 + number], params))
    tokens = []
    while not engine.is_idle:
        tokens += [token.token_id for token in engine.step()]
    return tokens


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_steps_that_come_are_there(oracle, num_drafts: int) -> None:
    config = EngineConfig(chunk=48, num_drafts=num_drafts)
    (engine, recorder), (cold, _) = engine_of(config), engine_of(config)
    warmed = engine.warm_up()
    assert warmed is not None
    assert 0 < warmed.done == warmed.planned
    assert str(warmed).startswith(f"warmed up with {warmed.done} shapes of steps in ")
    assert set(recorder.rows) == {n * rows for n in (1, 2, 3, 4, 5) for rows in range(1, 2 + num_drafts)}
    before = len(recorder.rows)
    prompt = oracle["code"].prompt_ids
    assert answer(engine, prompt) == answer(cold, prompt)
    assert len(recorder.rows) == before, "all steps were recorded already"


def test_nothing_is_counted_or_kept(oracle) -> None:
    engine, _ = engine_of(EngineConfig(chunk=48, num_drafts=1))
    engine.warm_up()
    load = engine.load()
    assert load.free_pages == load.num_pages == NUM_TOKENS // PAGE_SIZE
    assert load.cached_pages == 0
    assert (engine.num_steps, engine.num_tokens, engine.num_prompt_tokens) == (0, 0, 0)
    assert engine.num_prefilled_tokens == sum(engine.acceptance.drafted) == 0
    answer(engine, oracle["code"].prompt_ids)
    engine.add(Request("late", oracle["code"].prompt_ids, SamplingParams(max_tokens=1)))
    with pytest.raises(AssertionError, match="it is in use"):
        engine.warm_up()


def test_who_only_prefills_records_nothing() -> None:
    engine, recorder = engine_of(EngineConfig(chunk=48))
    warmed = engine.warm_up(decodes=False)
    assert warmed is not None
    assert warmed.done > 0
    assert not recorder.rows


def test_an_eager_engine_has_nothing_to_prepare() -> None:
    assert Engine(fused(), new_cache(fused(), NUM_TOKENS), EngineConfig()).warm_up() is None


def test_what_the_time_does_not_suffice_for_is_left_and_said() -> None:
    engine, recorder = engine_of(EngineConfig(chunk=48))
    runner = engine._runner
    work = WarmUp(fused(), runner._cache, runner.draw, 48, 0)
    warmed = work.run(runner._graphs, most_seconds=0)
    assert warmed.done == 0
    assert not recorder.rows
    assert f"; {warmed.planned} more are made when they come" in str(warmed)


def test_the_likeliest_steps_give_way_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.graphs.MOST_RECORDED", 3)
    monkeypatch.setattr("workers.warm_up.MOST_RECORDED", 3)
    engine, recorder = engine_of(EngineConfig(chunk=48))
    engine.warm_up()
    assert recorder.rows == [1, 2, 4], "powers of two first"
    graphs = engine._runner._graphs
    assert graphs is not None
    graphs.warm_up(5, 1)
    graphs.warm_up(1, 1)
    graphs.warm_up(2, 1)
    assert recorder.rows == [1, 2, 4, 5], "the largest has given way"


def test_every_shape_is_a_bucket_of_its_own_and_has_room() -> None:
    config, room = fused().config, 32768
    shapes = likely_shapes(config, room)
    assert len({Bucket.of(n, 1, context, config) for n, context in shapes}) == len(shapes)
    for n, context in shapes:
        assert Bucket.of(n, 1, context, config) == Bucket(n, 1, context)
    first = [n for n, context in shapes[:9] if context == config.index_topk]
    assert first == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    longest = config.max_position_embeddings
    assert (room // longest, longest) in shapes
    assert all(n * context <= 2 * room or context == config.index_topk for n, context in shapes)
    assert {context for _, context in shapes} == {
        Bucket.of(1, 1, length, config).context for length in range(1, longest + 1)
    }


def test_as_many_shapes_as_can_be_kept() -> None:
    work = WarmUp(fused(), new_cache(fused(), 65536), lambda *_: pytest.fail("draws"), 48, 3)
    steps = list(work._steps(DecodeGraphs(fused(), new_cache(fused(), 64), Recorder())))
    assert len(steps) == MOST_RECORDED


@pytest.mark.gpu
def test_on_a_gpu_a_warm_engine_records_no_more(oracle) -> None:
    from tests.checkpoints import DEMO
    from workers.local import LocalModel, ModelOptions

    options = ModelOptions(dtype="bfloat16", pages="fp8", kernels="triton", device="cuda")
    engine = LocalModel(DEMO, options).engine(EngineConfig(chunk=48, num_drafts=1), NUM_TOKENS)
    warmed = engine.warm_up()
    assert warmed is not None
    assert warmed.done == warmed.planned
    graphs = engine._runner._graphs
    assert graphs is not None
    recorded = set(graphs._steps), set(graphs._drafts)
    answer(engine, oracle["code"].prompt_ids)
    assert (set(graphs._steps), set(graphs._drafts)) == recorded
    assert torch.cuda.current_stream().query()
