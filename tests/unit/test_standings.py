"""Who leads a comparison, how surely, and who is efficient."""

import csv
import io
import json

import pytest
from PIL import Image

from tunewright.evaluate import chance, compare, frontier, standings, verdict
from tunewright.evaluate.compare import Subject
from tunewright.evaluate.standings import MEMORY, TIME, Entrant, Standings, Try


def stage(exact=None, loss=1.0, seconds=10.0, memory=2**30, count=400, **more):
    answered = {} if exact is None else {"exact_match": exact, "f1": exact, "count": count}
    return {
        "before": {"loss": 3.0}, "after": {"loss": loss, **answered, **more}, "artifact_bytes": 1000,
        "train": {"seconds": seconds, "peak_memory": memory, "tokens_per_second": 100.0, "steps": 4},
        "parameters": {"trainable": 10, "share": 0.01},
    }  # fmt: skip


def entrant(name, *exact, **more):
    return Entrant(name, [Try(seed, stage(value, **more)) for seed, value in enumerate(exact)])


def failing(name, reason="out of memory"):
    return Entrant(name, [Try(0, {}, reason=reason)])


def english(*entrants):
    return [one.en for one in verdict.sentences(Standings(entrants))]


def test_paired_differences_have_an_interval_of_student():
    found = chance.paired([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    assert found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert not found.is_clear
    assert chance.paired([0.50, 0.61], [0.40, 0.51]).is_clear
    assert chance.paired([0.5], [0.1]) == chance.Difference(0.4)
    assert not chance.paired([0.5], [0.1]).is_clear


def test_what_seeds_have_in_common_is_no_difference():
    found = Standings([entrant("a", 0.2, 0.8, 0.5), entrant("b", 0.1, 0.7, 0.4)])
    assert found.difference(found.ranked[1]).low == pytest.approx(-0.1)
    assert found.is_behind(found.ranked[1])


def test_few_questions_make_a_clear_difference_doubtful():
    two = [entrant("a", 0.52, 0.53, 0.52, count=50), entrant("b", 0.50, 0.51, 0.50, count=50)]
    assert not Standings(two).is_behind(two[1])
    assert "With 50 questions, a difference this small may be chance." in english(*two)


def test_one_seed_proves_nothing():
    assert "One seed: differences may be chance." in english(entrant("a", 0.9), entrant("b", 0.1))


def test_a_clear_lead_is_told_with_its_size_in_both_languages():
    words = verdict.sentences(Standings([entrant("b", 0.1, 0.12, 0.11), entrant("a", 0.5, 0.52, 0.51)]))
    assert words[0].en == "a is best by exact match: 51.0% ± 1.0%, before b with 11.0% ± 1.0%."
    assert words[0].zh == "按完全正确率，a 最好：51.0% ± 1.0%；其次是 b：11.0% ± 1.0%。"
    assert words[1].en == "Over 3 seeds the difference of the two is 40.0% to 40.0% (95 %, paired)."


def test_the_cheapest_of_those_that_chance_may_have_put_behind_is_named():
    told = english(entrant("a", 0.5, 0.6, seconds=100.0), entrant("b", 0.5, 0.59, seconds=50.0))
    assert "Not told apart from the best: a; b." in told
    assert "Of these, b has the lowest training time (50s); a has the lowest peak memory (1.0 GB)." in told


def test_losses_decide_where_answers_do_not_and_lower_is_better():
    found = Standings([entrant("a", 0.0, 0.0, loss=2.0), entrant("b", 0.0, 0.0, loss=1.0)])
    assert found.measure.name.en == "held-out loss"
    assert found.ranked[0].name == "b"


def test_losses_may_tell_apart_what_answers_do_not():
    a, b = entrant("a", 0.01, 0.03, loss=2.0), entrant("b", 0.0, 0.0, loss=6.0)
    assert "By held-out loss a leads clearly: 2.000 ± 0.000, before b with 6.000 ± 0.000." in english(a, b)


def test_rewards_come_after_exact_match():
    a, b = entrant("a", None, worth={"x.py:f": 1.0}), entrant("b", None, worth={"x.py:f": 2.0})
    assert Standings([a, b]).measure.name.en == "reward x.py:f"
    assert Standings([a, b]).ranked[0] is b


def test_the_frontier_has_whom_nobody_beats():
    cheap, middle, dear = (
        entrant("c", 0.3, seconds=1.0),
        entrant("m", 0.2, seconds=2.0),
        entrant("d", 0.9, seconds=9.0),
    )
    assert Standings([dear, middle, cheap]).frontier(TIME) == [cheap, dear]
    twin = entrant("t", 0.3, seconds=1.0)
    assert {e.name for e in Standings([cheap, twin, middle]).frontier(TIME)} == {"c", "t"}


def test_names_in_the_picture_cover_nothing():
    crowd = [
        entrant(f"lora, rank {n}", 0.5 + n / 1000, 0.51 + n / 1000, seconds=10.0 + n / 10) for n in range(5)
    ]
    found = frontier.picture(Standings(crowd), TIME)
    boxes = [frontier._label(mark) for mark in found.marks]
    assert sum(one.overlap(other) for one in boxes for other in boxes if one is not other) == 0
    assert all(0 <= mark.high <= mark.y <= mark.low <= 100 for mark in found.marks)
    assert frontier.picture(Standings(crowd[:1]), TIME) is None


def test_what_failed_is_told_and_what_is_left_is_compared():
    told = english(entrant("a", 0.5, 0.6), failing("b"), entrant("c", 0.1, 0.2))
    assert told[0].startswith("a is best")
    assert told[-1] == "b, seed 0, failed: out of memory"
    assert english(failing("a"), failing("b"))[0] == "Nothing came to its end."


def test_forgetting_is_the_rise_of_the_old_loss():
    tried = [Try(0, {**stage(0.5, old={"wiki": 2.5}), "before": {"old": {"wiki": 2.0}}})]
    kept = [Try(0, {**stage(0.4, old={"wiki": 2.1}), "before": {"old": {"wiki": 2.0}}})]
    assert Entrant("a", tried).forgotten() == {"wiki": 0.5}
    assert "On the old data “wiki” b forgot least (loss +0.100), a most (+0.500)." in english(
        Entrant("a", tried), Entrant("b", kept)
    )


def test_time_between_a_stop_and_going_on_is_no_training():
    log = [
        {"kind": "train", "step": 0, "time": 100.0}, {"kind": "step", "step": 1, "time": 101.0, "loss": 3.0},
        {"kind": "step", "step": 2, "time": 102.0, "loss": 2.0}, {"kind": "train", "step": 1, "time": 900.0},
        {"kind": "step", "step": 2, "time": 901.0, "loss": 1.5},
    ]  # fmt: skip
    assert compare._steps(log) == {1: (1.0, 3.0), 2: (2.0, 1.5)}


def test_the_page_the_table_and_the_picture(tmp_path):
    log = [{"kind": "train", "step": 0, "time": 0.0}]
    log += [{"kind": "step", "step": n, "time": float(n), "loss": 3.0 / n} for n in range(1, 5)]
    good = Entrant(
        "<b>a</b>", [Try(0, stage(0.5), log), Try(1, stage(0.6), log)], {"seconds": 0.1, "merged": False}
    )
    other = Entrant("b", [Try(0, stage(0.1, seconds=99.0), log), Try(1, {}, reason="<i>died</i>")])
    compare.write(tmp_path, Subject("trial", [("model", "m")], ["a note"]), [good, other, failing("c")])
    page = (tmp_path / "report.html").read_text()
    assert "<b>a</b>" not in page and "&lt;b&gt;a&lt;/b&gt;" in page and "<i>died</i>" not in page
    assert "100 ms, unmerged" in page and "最好" in page and "Training loss over time" in page
    assert "http" not in page.replace("http-equiv", "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert [row["failed"] for row in rows] == ["", "", "", "<i>died</i>", "out of memory"]
    assert rows[1]["exact_match"] == "0.6"
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [row.get("is_best") for row in record["rows"]] == [True, False, None]
    assert record["rows"][0]["efficient_by"] == ["seconds", "peak_memory"]
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.size[0] == 1600


def test_nothing_to_draw_is_still_a_report(tmp_path):
    record = compare.write(tmp_path, Subject("trial", []), [failing("a")])
    assert record["measure"] is None
    assert standings.to_json(Standings([failing("a")]))[0]["failed"]
    assert frontier.picture(Standings([failing("a")]), MEMORY) is None
    assert (tmp_path / "comparison.png").exists()
