"""The outcome of a comparison in sentences, English and Chinese, no surer than the numbers are."""

from collections.abc import Iterator, Sequence
from textwrap import shorten

from tunewright.core.words import Words
from tunewright.evaluate.standings import LOSS, MEMORY, TIME, Cost, Entrant, Standings

_REASON = 100
"""Characters; the table has more."""


def sentences(standings: Standings) -> list[Words]:
    """Who leads, by how much and how surely; who is cheap among its peers; who is efficient; who failed."""
    ranked = standings.ranked
    if not ranked:
        return [Words("Nothing came to its end.", "没有一个完成。"), *_failures(standings)]
    return [*_lead(standings), *_surety(standings), *_by_loss(standings), *_cheapest(standings), *_fronts(standings), *_memory(standings),
            *_failures(standings)]  # fmt: skip


def _lead(standings: Standings) -> Iterator[Words]:
    best, measure = standings.ranked[0], standings.measure
    told = _scored(standings, best)
    if len(standings.ranked) == 1:
        yield Words(f"{best.name} has {measure.name.en} {told}; there is nothing to compare it with.",
                    f"{best.name} 的{measure.name.zh}为 {told}；没有可以比较的对象。")  # fmt: skip
        return
    second = standings.ranked[1]
    if standings.quality(best) == standings.quality(second):
        yield Words(f"By {measure.name.en}, {best.name} and {second.name} come out the same: {told}.",
                    f"按{measure.name.zh}，{best.name} 与 {second.name} 相同：{told}。")  # fmt: skip
        return
    rest = _scored(standings, second)
    yield Words(f"{best.name} is best by {measure.name.en}: {told}, before {second.name} with {rest}.",
                f"按{measure.name.zh}，{best.name} 最好：{told}；其次是 {second.name}：{rest}。")  # fmt: skip


def _scored(standings: Standings, entrant: Entrant) -> str:
    """``61.3% ± 1.2%``."""
    spread, shown = standings.spread(entrant), standings.measure.shown
    return shown(standings.quality(entrant)) + ("" if spread is None else f" ± {shown(spread)}")


def _surety(standings: Standings) -> Iterator[Words]:
    if len(standings.ranked) < 2:
        return
    second = standings.ranked[1]
    difference, shown = standings.difference(second), standings.measure.shown
    if difference is None or difference.low is None or difference.high is None:
        yield Words("One seed: differences may be chance.", "只有一个种子：差别可能出于偶然。")
        if difference is not None and abs(difference.mean) < standings.chance(second):
            yield _few_questions(second)
        return
    seeds = len(set(second.scores(standings.measure)) & set(standings.ranked[0].scores(standings.measure)))
    low, high = sorted((abs(difference.low), abs(difference.high)))
    if difference.is_clear:
        yield Words(f"Over {seeds} seeds the difference of the two is {shown(low)} to {shown(high)} (95 %, paired).",
                    f"在 {seeds} 个种子上成对比较，两者之差为 {shown(low)} 至 {shown(high)}（95%）。")  # fmt: skip
    else:
        yield Words(f"Over {seeds} seeds the difference of the two may be chance: its 95 % interval includes zero.",
                    f"在 {seeds} 个种子上，两者之差可能出于偶然：95% 区间包含零。")  # fmt: skip
    if difference.is_clear and not standings.is_behind(second):
        yield _few_questions(second)


def _by_loss(standings: Standings) -> Iterator[Words]:
    """Losses are finer than answers: they may tell apart what answers do not."""
    other = Standings(standings.entrants, by=LOSS)
    if len(other.ranked) < 2 or standings.measure == LOSS or standings.is_behind(standings.ranked[1]):
        return
    best, second = other.ranked[:2]
    if other.is_behind(second):
        low, high = _scored(other, best), _scored(other, second)
        yield Words(f"By held-out loss {best.name} leads clearly: {low}, before {second.name} with {high}.",
                    f"按留出集损失，{best.name} 明显领先：{low}；其次是 {second.name}：{high}。")  # fmt: skip


def _few_questions(entrant: Entrant) -> Words:
    count = entrant.done[0].stage["after"]["count"]
    return Words(f"With {count:,} questions, a difference this small may be chance.",
                 f"只有 {count:,} 个问题，这样小的差别可能出于偶然。")  # fmt: skip


def _cheapest(standings: Standings) -> Iterator[Words]:
    peers = standings.peers()
    if standings.spread(standings.ranked[0]) is None or len(peers) < 2:
        return
    names = _list(peers)
    yield Words(f"Not told apart from the best: {names.en}.", f"与最好者无法区分：{names.zh}。")
    cheap = [_least(peers, cost) for cost in (TIME, MEMORY)]
    if told := [one for one in cheap if one]:
        yield Words(
            f"Of these, {'; '.join(one.en for one in told)}.", f"其中，{'；'.join(one.zh for one in told)}。"
        )


def _least(entrants: Sequence[Entrant], cost: Cost) -> Words | None:
    """Who pays least."""
    priced = {entrant.name: price for entrant in entrants if (price := entrant.mean(*cost.path)) is not None}
    if not priced:
        return None
    name = min(priced, key=lambda one: priced[one])
    told = cost.shown(priced[name])
    return Words(f"{name} has the lowest {cost.name.en} ({told})", f"{name} 的{cost.name.zh}最低（{told}）")


def _list(entrants: Sequence[Entrant]) -> Words:
    """Names with a comma of their own may be among them."""
    names = [entrant.name for entrant in entrants]
    return Words("; ".join(names), "；".join(names))


def _fronts(standings: Standings) -> Iterator[Words]:
    for cost in (TIME, MEMORY):
        if front := standings.frontier(cost):
            names = _list(front)
            yield Words(f"Efficient by {cost.name.en} (none is as good for less): {names.en}.",
                        f"按{cost.name.zh}有效率（没有更省而同样好的）：{names.zh}。")  # fmt: skip


def _memory(standings: Standings) -> Iterator[Words]:
    """What became of old data."""
    rises = {entrant.name: rise for entrant in standings.ranked if (rise := entrant.forgotten())}
    for name in next(iter(rises.values()), {}):
        least, most = (pick(rises, key=lambda one: rises[one][name]) for pick in (min, max))
        if least != most:
            low, high = rises[least][name], rises[most][name]
            yield Words(f"On the old data “{name}” {least} forgot least (loss {_signed(low)}), {most} most ({_signed(high)}).",
                        f"在旧数据“{name}”上，{least} 遗忘最少（损失 {_signed(low)}），{most} 最多（{_signed(high)}）。")  # fmt: skip


def _signed(rise: float) -> str:
    return f"{round(rise, 3) + 0.0:+.3f}"  # no minus before zero


def _failures(standings: Standings) -> Iterator[Words]:
    for entrant in standings.entrants:
        for one in entrant.tries:
            if one.reason:
                reason = shorten(one.reason, _REASON, placeholder=" ...")
                yield Words(f"{entrant.name}, seed {one.seed}, failed: {reason}",
                            f"{entrant.name}（种子 {one.seed}）失败：{reason}")  # fmt: skip
