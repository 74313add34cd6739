"""Prompts: as long as asked for, different from the first words on, the same for the same seed."""

from cluster.bench.prompts import PromptMaker, TokenCost


def test_prompts_have_the_length_that_was_asked_for() -> None:
    maker = PromptMaker(1, TokenCost())
    for tokens in (1, 5, 8, 9, 1000, 200_000):
        assert len(maker.text(tokens, 3).split(" ")) == tokens


def test_lengths_follow_what_words_cost() -> None:
    cost = TokenCost.between(((24, 46), (152, 238)))
    assert cost == TokenCost(1.5, 10.0)
    assert len(PromptMaker(1, cost).text(310, 3).split()) == 200


def test_no_two_begin_alike() -> None:
    maker = PromptMaker(1, TokenCost())
    beginnings = {tuple(maker.text(50, key).split()[:4]) for key in range(2000)}
    assert len(beginnings) == 2000


def test_a_seed_makes_the_same_texts() -> None:
    first, second = PromptMaker(1, TokenCost()), PromptMaker(1, TokenCost())
    assert first.text(300, 7) == second.text(300, 7)
    assert first.text(300, 7) != PromptMaker(2, TokenCost()).text(300, 7)


def test_what_is_shared_is_one_text() -> None:
    maker = PromptMaker(1, TokenCost())
    assert len(maker.shared(64).split()) == 64
    assert maker.shared(64) == PromptMaker(1, TokenCost()).shared(64)
    assert maker.shared(0) == ""
