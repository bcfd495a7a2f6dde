"""The batches of every step, cut into what fits, named for people."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from tunewright.data.template import ChatCodec
from tunewright.data.tokens import LENGTH, SAMPLE
from tunewright.objectives.sft import Config, Sft
from tunewright.recipes import TrainConfig
from tunewright.train.feed import Feed

TALKS = [(f"Say {n}.", "word " * n) for n in (1, 2, 3, 5, 8, 13, 2, 4, 6, 9, 1, 7)]
MakeFeed = Callable[..., Feed]


@pytest.fixture
def make_feed(make_mixture: Any, tokenizer: Any) -> MakeFeed:
    def make(talks: list[tuple[str, str]] = TALKS, **train: Any) -> Feed:
        config = TrainConfig(**{"tokens_per_batch": 64, **train})
        objective = Sft(Config(), ChatCodec(tokenizer))
        return Feed(make_mixture(talks), objective, config, torch.device("cpu"))

    return make


def ordered(feed: Feed, start: int, count: int) -> list[list[int]]:
    return [indices.tolist() for indices in islice(feed.from_step(start), count)]


def test_an_epoch_is_every_sample_once(make_feed: MakeFeed) -> None:
    feed = make_feed(epochs=1)
    assert feed.steps > 2
    seen = [index for batch in ordered(feed, 0, feed.steps) for index in batch]
    assert sorted(seen) == list(range(len(TALKS)))


def test_steps_go_on_from_anywhere_as_from_the_start(make_feed: MakeFeed) -> None:
    feed = make_feed(epochs=1)
    whole = ordered(feed, 0, 3 * feed.steps)
    assert whole[: feed.steps] != whole[feed.steps : 2 * feed.steps]
    for start in range(2 * feed.steps):
        assert ordered(make_feed(epochs=1), start, feed.steps) == whole[start : start + feed.steps]


def test_given_steps_overrule_epochs(make_feed: MakeFeed) -> None:
    assert make_feed(epochs=5, max_steps=2).steps == 2


def test_a_typical_batch_is_of_middling_length(make_feed: MakeFeed) -> None:
    feed = make_feed()
    longest = sorted(int(feed.data.lengths[batch].max()) for batch in islice(feed.from_step(0), feed.steps))
    assert int(feed.data.lengths[feed.typical()].max()) == longest[len(longest) // 2]


def in_order(feed: Feed) -> list[int]:
    return [index for part in feed.in_order(64) for index in part.tolist()]


def test_of_an_epoch_or_more_all_samples_come_by_length(make_feed: MakeFeed) -> None:
    for feed in (make_feed(epochs=1), make_feed(epochs=2.5), make_feed(max_steps=make_feed(epochs=1).steps)):
        assert sorted(in_order(feed)) == list(range(len(TALKS)))
        lengths = feed.data.lengths[in_order(feed)].tolist()
        assert lengths == sorted(lengths)


def test_of_less_than_an_epoch_only_what_is_learned_from_comes(make_feed: MakeFeed) -> None:
    feed = make_feed(max_steps=2)
    learned = [index for batch in ordered(feed, 0, 2) for index in batch]
    assert len(learned) < len(TALKS)
    assert sorted(in_order(feed)) == sorted(learned)
    lengths = feed.data.lengths[in_order(feed)].tolist()
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("budget", [1, 20, 40, 64])
def test_the_parts_of_a_step_are_its_samples_in_order_within_the_budget(
    make_feed: MakeFeed, budget: int
) -> None:
    feed = make_feed()
    for indices in islice(feed.from_step(0), feed.steps):
        parts = feed.micro_batches(indices, budget)
        assert np.concatenate(parts).tolist() == indices.tolist()
        for part in parts:
            assert len(part) == 1 or len(part) * feed.data.lengths[part].max() <= budget


def test_a_batch_is_the_samples_padded(make_feed: MakeFeed) -> None:
    feed = make_feed()
    batch = feed.batch([5, 0])
    longest = int(feed.data.lengths[5])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest)
    assert batch["input_ids"][0].tolist() == feed.data[5]["input_ids"].tolist()
    short = len(feed.data[0]["input_ids"])
    assert batch["input_ids"][1, :short].tolist() == feed.data[0]["input_ids"].tolist()
    assert set(batch["labels"][1, short - 1 :].tolist()) == {-100}


@pytest.mark.parametrize("indices", [[5, 0], np.array([5, 0])], ids=["list", "array"])
def test_a_batch_says_which_samples_it_holds_and_how_long_they_are(make_feed: MakeFeed, indices: Any) -> None:
    feed = make_feed()
    batch = feed.batch(indices)
    assert batch[SAMPLE].tolist() == [5, 0]
    assert batch[LENGTH].tolist() == [len(feed.data[index]["input_ids"]) for index in (5, 0)]
    assert batch[SAMPLE].dtype == batch[LENGTH].dtype == torch.int64


def test_tokens_are_counted_without_padding(make_feed: MakeFeed) -> None:
    feed = make_feed()
    assert feed.tokens(np.array([0, 5])) == sum(len(feed.data[i]["input_ids"]) for i in (0, 5))


@pytest.mark.parametrize("budget", [1, 30, 64])
def test_the_widest_micro_batch_is_the_largest_of_the_first_epoch(make_feed: MakeFeed, budget: int) -> None:
    feed = make_feed(epochs=1)
    parts = [p for batch in islice(feed.from_step(0), feed.steps) for p in feed.micro_batches(batch, budget)]
    sizes = [feed.batch(part)["input_ids"].numel() for part in parts]
    assert feed.batch(feed.widest(budget))["input_ids"].numel() == max(sizes)


@pytest.mark.parametrize("budget", [1, 64])
def test_padding_is_told_as_a_share_of_the_first_epoch(make_feed: MakeFeed, budget: int) -> None:
    feed = make_feed(epochs=1)
    parts = [p for batch in islice(feed.from_step(0), feed.steps) for p in feed.micro_batches(batch, budget)]
    padded = sum(feed.batch(part)["input_ids"].numel() for part in parts)
    assert feed.padding_share(budget) == pytest.approx(1 - int(feed.data.lengths.sum()) / padded)
    assert (feed.padding_share(budget) == 0) == (budget == 1)


def test_samples_are_named_by_file_and_line_and_the_rest_counted(make_feed: MakeFeed) -> None:
    feed = make_feed()
    table = feed.data.tables[0].source
    assert feed.names([2]) == f"{table}:3"
    assert feed.names(np.array([0, 7])) == f"{table}:1, {table}:8"
    assert feed.names(range(9)) == ", ".join(f"{table}:{n}" for n in range(1, 6)) + " and 4 more"


def test_what_all_samples_begin_with_counts_once_in_a_part(make_feed: MakeFeed) -> None:
    feed = make_feed()
    whole, budget = np.arange(len(TALKS)), 40
    before = feed.micro_batches(whole, budget)
    feed.share(True)
    alike = feed._shared
    ids = [sample["input_ids"] for sample in feed.data]
    assert all((one[:alike] == ids[0][:alike]).all() for one in ids)
    assert len({one[alike] for one in ids}) > 1
    parts = feed.micro_batches(whole, budget)
    assert len(parts) < len(before)
    own = [feed.data.lengths[part] - alike for part in parts]
    assert all(len(some) == 1 or alike + len(some) * some.max() <= budget for some in own)
    assert len(feed.widest(budget)) >= max(map(len, before))
    feed.share(False)
    assert [part.tolist() for part in feed.micro_batches(whole, budget)] == [part.tolist() for part in before]


def test_nothing_that_a_sample_learns_is_shared(make_feed: MakeFeed) -> None:
    """One question, and answers that begin alike: its last token foretells what is learned first, and is each one's own."""
    feed = make_feed([("Say it.", "word " * n) for n in (1, 2, 3)])
    feed.share(True)
    first = {int(np.argmax(sample["learned"])) for sample in feed.data}
    assert first == {feed._shared + 1}
