"""Scheduling is a function of host values: no model, no torch."""

from model.sampling_params import SamplingParams
from workers.schedule import schedule, schedule_ahead
from workers.sequence import Request, Sequence


def prefilling(num_prompt: int, num_cached: int = 0) -> Sequence:
    request = Request("p", tuple(range(num_prompt)), SamplingParams(max_tokens=8))
    sequence = Sequence(request, pages=[])
    sequence.num_cached = num_cached
    return sequence


def decoding(num_drafts: int) -> Sequence:
    sequence = prefilling(10, num_cached=10)
    sequence.tokens.append(99)
    sequence.drafts = list(range(num_drafts))
    return sequence


def test_decode_goes_first_and_prompts_share_the_rest_in_order() -> None:
    first, second, third = prefilling(100, 30), prefilling(50), prefilling(50)
    batch = schedule([first, decoding(2), second, decoding(0), third], max_rows=100)
    assert [(share.num_known, share.drafts) for share in batch.shares] == [
        (1, (0, 1)),
        (1, ()),
        (70, ()),
        (26, ()),
    ]
    assert batch.num_rows == 100
    assert [share.is_last_chunk for share in batch.shares] == [True, True, True, False]
    assert batch.shares[2].token_ids == list(range(30, 100))


def test_decode_runs_even_beyond_the_budget() -> None:
    batch = schedule([prefilling(5), *(decoding(3) for _ in range(4))], max_rows=8)
    assert batch.num_rows == 16
    assert all(share.sequence.phase == "decode" for share in batch.shares)


def test_nothing_to_run_is_an_empty_batch() -> None:
    assert schedule([], max_rows=8).shares == ()


def test_parts_are_as_equal_as_whole_sequences_allow() -> None:
    def halves(*sequences: Sequence, count: int = 2) -> list[list[int]]:
        batch = schedule(sequences, max_rows=1000)
        parts = batch.parts(count)
        assert tuple(share for part in parts for share in part.shares) == batch.shares  # in order, none lost
        return [[share.num_rows for share in part.shares] for part in parts]

    assert halves(decoding(3)) == [[4]]
    assert halves(decoding(0), decoding(3)) == [[1], [4]]
    assert halves(*(decoding(1) for _ in range(5))) == [[2, 2], [2, 2, 2]]
    assert halves(prefilling(100), *(decoding(0) for _ in range(8))) == [[1] * 8, [100]]
    assert halves(prefilling(10), prefilling(100), prefilling(60), prefilling(30)) == [[10, 100], [60, 30]]
    assert halves(*(decoding(1) for _ in range(5)), count=3) == [[2, 2], [2], [2, 2]]
    assert halves(decoding(0), decoding(3), count=3) == [[1], [4]]
    assert halves(decoding(0), decoding(3), count=1) == [[1, 4]]


def asking(**params: object) -> Sequence:
    """It decodes, and has one token of its answer."""
    request = Request("a", tuple(range(10)), SamplingParams(**{"max_tokens": 8, **params}))  # type: ignore[arg-type]
    sequence = Sequence(request, pages=[])
    sequence.num_cached = 10
    sequence.tokens.append(99)
    return sequence


def test_the_step_after_one_that_runs_is_a_row_of_each_that_goes_on() -> None:
    going, ending, leaving = asking(), asking(max_tokens=2), asking()
    batch = schedule([going, ending, leaving], max_rows=100)
    ahead = schedule_ahead(batch, [going, ending])
    assert ahead is not None
    assert [(share.sequence, share.num_rows) for share in ahead.shares] == [(going, 1)]
    assert ahead.shares[0].sequence is going
    assert schedule_ahead(batch, []) is None
    assert schedule_ahead(schedule([ending], max_rows=100), [ending]) is None


def test_what_the_next_step_cannot_know_is_waited_for() -> None:
    going = asking()
    for other in (decoding(1), prefilling(5), asking(logprobs=0), asking(presence_penalty=1.0)):
        assert schedule_ahead(schedule([going, other], max_rows=100), [going, other]) is None
    batch = schedule([going], max_rows=100)
    assert schedule_ahead(batch, [going, prefilling(5)]) is None, "it has come meanwhile"
    assert schedule_ahead(batch, [going]) is not None
