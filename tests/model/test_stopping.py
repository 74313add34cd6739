import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from model.stopping import StopChecker, finish_reason


def cut_reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Looks at every end in turn: the first stop string to be complete, the longer one if two are."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def held_reference(text: str, stops: list[str]) -> str:
    """The longest end of the text that is the beginning of a stop string, but not all of one."""
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) and stop != text[start:] for stop in stops):
            return text[start:]
    return ""


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


# Two letters and short strings, so that stop strings overlap, nest and repeat.
texts = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(texts, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_text_equals_the_reference_however_it_was_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    checker = StopChecker(stops)
    shown = "".join(checker.feed(piece) for piece in pieces(text, cuts)) + checker.finish()
    assert (shown, checker.stopped) == cut_reference(text, stops)


@given(texts, stop_lists)
def test_holds_back_exactly_what_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += checker.feed(character)
        if checker.stopped:
            break
        assert shown + held_reference(text[:end], stops) == text[:end]


@pytest.mark.parametrize(
    ("stops", "fed", "shown"),
    [
        pytest.param(["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], id="across pieces"),
        pytest.param(["abcd", "bc"], ["ab", "cd"], ["", "a"], id="the first to be complete"),
        pytest.param(["bc", "abc"], ["ab", "c"], ["", ""], id="the longer of two"),
        pytest.param(["aab"], ["aaaa", "b!"], ["aa", ""], id="falls back inside a repeat"),
        pytest.param(["é世"], ["caf", "é世界"], ["caf", ""], id="not ascii"),
        pytest.param(["x"], ["", "", "y"], ["", "", "y"], id="empty pieces"),
    ],
)
def test_pieces_shown(stops: list[str], fed: list[str], shown: list[str]) -> None:
    checker = StopChecker(stops)
    assert [checker.feed(piece) for piece in fed] == shown


def test_after_a_stop_nothing_comes_out() -> None:
    checker = StopChecker(["stop"])
    assert checker.feed("go stop on") == "go "
    assert checker.stopped
    assert checker.feed("more") == ""
    assert checker.finish() == ""


def test_finish_gives_back_what_was_held_once() -> None:
    checker = StopChecker(["stop"])
    assert checker.feed("sto") == ""
    assert checker.finish() == "sto"
    assert checker.finish() == ""
    assert not checker.stopped


def test_work_is_linear_in_the_text() -> None:
    """Each character may fall back many times only if as many characters before it climbed."""
    steps = 0

    class Counting(dict[str, int]):
        def __contains__(self, key: object) -> bool:
            nonlocal steps
            steps += 1
            return super().__contains__(key)

    checker = StopChecker(["a" * 255 + "b", "a" * 127 + "c"])
    checker._next = [Counting(edges) for edges in checker._next]
    text = ("a" * 254 + "d") * 40
    assert checker.feed(text) == text  # it ends with a "d", so nothing is held
    # A step up and a step back a character; a search from every place would take 255 of them.
    assert steps <= 2 * len(text) + 1


@pytest.mark.parametrize(
    ("token_id", "num_generated", "ignore_eos", "reason"),
    [
        pytest.param(5, 1, False, None, id="goes on"),
        pytest.param(1, 1, False, "stop", id="end of sequence"),
        pytest.param(1, 1, True, None, id="end of sequence ignored"),
        pytest.param(7, 1, True, "stop", id="own stop token, whatever ignore_eos says"),
        pytest.param(5, 2, False, None, id="one token left"),
        pytest.param(5, 3, False, "length", id="length"),
        pytest.param(1, 3, False, "stop", id="ends by itself on the last token"),
        pytest.param(1, 3, True, "length", id="ignored on the last token"),
    ],
)
def test_finish_reason(token_id: int, num_generated: int, ignore_eos: bool, reason: str | None) -> None:
    asked = SamplingParams(max_tokens=3, stop_token_ids=(7,), ignore_eos=ignore_eos)
    assert finish_reason(token_id, num_generated, asked, {1}) == reason
