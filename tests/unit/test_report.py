"""The report page: what it says, what it must not do with untrusted text, and what it does without scores."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunewright.core import journal, store
from tunewright.core.errors import DamagedError
from tunewright.evaluate import charts, report
from tunewright.evaluate.charts import History
from tunewright.evaluate.report import Change

Tree = dict[str, Any]
STEPS = 600
EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 1 << 30)
FAMILIES = {  # exact match before and after, of 40
    "arithmetic.en": (6, 31), "arithmetic.zh": (4, 29), "facts.en": (9, 24), "facts.zh": (8, 22),
    "rewrite.en": (2, 36), "rewrite.zh": (0, 35), "sequence.en": (5, 5), "sequence.zh": (7, 4),
    "story.en": (11, 38), "翻译": (3, 33),
}  # fmt: skip
LONG = "Rewrite in one sentence. " + "The cook carries a red bowl into the garden and waits for rain. " * 9
SAMPLES = [
    ("arithmetic.en", "What is 17 + 25?", "42", "17 + 25 is 32", "42"),
    ("arithmetic.zh", "请计算：63减28。", "35", "28", "35。"),
    ("facts.zh", "冰岛的首都是哪座城市？", "雷克雅未克", "奥斯陆", "雷克雅未克"),
    ("rewrite.en", LONG, "A cook waits in the garden with a red bowl.", "", "A cook waits in the garden."),
    ("sequence.zh", "2、4、6、8，下一个数是多少？", "10", "10", "12"),
    ("story.en", "Mia has a <b>kite</b>. Where is Mia?\n<script>alert('x')</script>",
     "in the park", "<img src=x onerror=y>", "in the park"),
    ("翻译", "把这句话译成中文：“The early bird catches the worm.”",
     "早起的鸟儿有虫吃", "早起的鸟", "早起的鸟儿有虫吃"),
]  # fmt: skip


def scores(which: int, loss: float) -> Tree:
    families = {
        name: {"count": 40, "exact_match": right[which] / 40, "f1": min(1.0, right[which] / 36)}
        for name, right in FAMILIES.items()
    }
    count = 40 * len(FAMILIES)
    exact = sum(right[which] for right in FAMILIES.values()) / count
    answered = {"count": count, "exact_match": exact, "f1": exact + 0.05, "families": families}
    return {"loss": loss, "perplexity": math.exp(loss), **answered}


def dataset(path: str, rows: int, skipped: int = 0) -> Tree:
    shape = [n * rows // 8000 for n in (0, 8, 402, 2510, 3120, 1490, 470, 0, 0, 0)]
    bins = zip(EDGES, EDGES[1:], shape, strict=False)
    file = {
        "path": path, "sha256": "ab12" * 16, "rows": rows, "good": rows - skipped, "problems": skipped,
        "cjk": 0.496, "families": dict.fromkeys(FAMILIES, rows // 10),
    }  # fmt: skip
    return {
        "samples": sum(shape), "tokens": rows * 147, "longest": 412 if rows else 0,
        "lengths": [{"from": low, "below": below, "samples": n} for low, below, n in bins],
        "skipped": [f"{path}:{n * 7 + 5}: turn 2 (assistant) is empty" for n in range(skipped)],
        "files": [file] if rows else [],
    }  # fmt: skip


def stage(name: str = "sft", **changes: Any) -> Tree:
    samples = [
        dict(zip(("family", "prompt", "reference", "before", "after"), s, strict=True)) for s in SAMPLES
    ]
    train, valid = dataset("/data/chat/train.jsonl", 8000, 3), dataset("/data/chat/valid.jsonl", 400)
    made: Tree = {
        "name": name, "model": "builtin:pico", "precision": "bf16", "objective": {"name": "sft"},
        "method": {"name": "lora", "rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "train_config": {"epochs": 1.0, "lr": 0.0005},
        "parameters": {"total": 5_553_408, "trainable": 77_824, "share": 77_824 / 5_553_408},
        "data": {"train": train, "valid": valid, "padding_share": 0.0312},
        "before": scores(0, 2.871), "after": scores(1, 1.204), "samples": samples,
        "train": {"steps": STEPS, "planned_steps": STEPS, "tokens": 2_400_000, "learned_tokens": 612_000,
                  "seconds": 411.5, "tokens_per_second": 5832.0, "best_step": 500, "peak_memory": 1 << 31},
        "artifact": f"stages/{name}/adapter", "artifact_bytes": 318_488,
        "lineage": {"base": "builtin:pico", "base_sha256": "9ec9" * 16, "license": "Apache-2.0", "seed": 7,
                    "inputs_sha256": "cc5c" * 16, "versions": {"python": "3.11.7", "torch": "2.13.0"},
                    "hardware": {"processor": "Xeon", "cores": 2, "memory": 25 << 30, "accelerators": []}},
    }  # fmt: skip
    return {**made, **changes}


def log(name: str = "sft", resumed_at: int = 400) -> list[Tree]:
    """A run that was killed after step 450 and went on from 400."""
    tried = [
        ("train", 0),
        *(("step", n) for n in range(1, 451)),
        ("resume", resumed_at),
        ("train", resumed_at),
    ]
    tried += [("step", n) for n in range(resumed_at + 1, STEPS + 1)]
    noise = random.Random(7)
    found = [event for kind, step in tried for event in happened(kind, step, noise)]
    return [{"time": 1.7e9 + n, "stage": name, **event} for n, event in enumerate(found)]


def happened(kind: str, step: int, noise: random.Random) -> list[Tree]:
    if kind != "step":
        return [{"kind": kind, "step": step}]
    rate = 5e-4 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    loss, speed = (
        1.15 + 1.7 * math.exp(-step / 90) + noise.gauss(0, 0.09),
        5800 + noise.gauss(0, 40) - 2000 / step,
    )
    made: list[Tree] = [{"kind": "step", "step": step, "loss": loss, "lr": rate, "tokens_per_second": speed}]
    if step % 100 == 0:
        made.append({"kind": "eval", "step": step, "loss": 1.2 + 1.65 * math.exp(-step / 85), "best": True})
    return made


def folder(at: Path, *stages: Tree, events: list[Tree] | None = None) -> Path:
    """A run folder as the pipeline leaves it."""
    at.mkdir(parents=True, exist_ok=True)
    store.write_record(at / "results.json", {"run": at.name, "status": "finished", "stages": list(stages)})
    journal_of(at / "events.jsonl", log() if events is None else events)
    store.write_text(
        at / "recipe.yaml", f"output: {at}\nstages:\n- name: sft\n  model: builtin:pico  # <模型>\n"
    )
    return at


def journal_of(path: Path, events: list[Tree]) -> None:
    path.write_bytes(b"".join(map(journal.line, events)))


def page(at: Path) -> str:
    report.write(at)
    return (at / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags that are closed in order, attributes, and the text that is seen."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "circle", "polyline")
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def read(html: str) -> Reader:
    reader = Reader(html)
    assert not reader.open
    assert len(set(reader.ids)) == len(reader.ids)
    assert [link for link in reader.links if link.removeprefix("#") not in reader.ids] == []
    return reader


@pytest.fixture
def sft(tmp_path: Path) -> str:
    return page(folder(tmp_path / "demo run", stage()))


def test_the_headline_says_what_was_gained(sft: str) -> None:
    text = read(sft).text
    assert "64.2% of 400 held-out questions are answered exactly right, 13.8% before training" in text
    assert "50.5 percentage points better." in text
    assert "The held-out loss fell, which is better: 2.871 before, 1.204 after." in text
    for figure in ("1.4%", "77.8 k of 5.55 M", "6m52s", "311.0 KB"):
        assert figure in text


def test_every_section_is_there(sft: str) -> None:
    text = read(sft).text
    for title in ("Scores per family", "Curves", "Samples side by side", "Data", "Cost", "Lineage", "Use it"):
        assert title in text
    for fact in (
        "Rows left out 3 0", "Rows with Chinese (CJK) 49.6%", "Padding in the batches 3.1%", "64–127 2,510",
        "ab12ab12ab12", "Peak memory 2.0 GB", "Apache-2.0", "9ec9" * 16, "torch 2.13.0", "stages/sft/adapter",
        "lora (rank 16, alpha 32, dropout 0.0, targets q_proj v_proj)", "turn 2 (assistant) is empty",
        "Resumed from a checkpoint at step 400.",
    ):  # fmt: skip
        assert fact in text


def test_a_family_that_lost_is_said_to_be_worse_and_comes_last(sft: str) -> None:
    text = read(sft).text
    assert "sequence.zh 40 17.5% 10.0% −7.5 worse" in text
    assert "sequence.en 40 12.5% 12.5% unchanged" in text
    names = re.findall(r'<th scope="row">([\w.]+)</th><td class="n">40<', sft)
    assert set(names) == set(FAMILIES)
    assert (names[0], names[-1]) == ("rewrite.zh", "sequence.zh")


def test_untrusted_text_is_shown_and_never_run(sft: str) -> None:
    reader = read(sft)
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    assert "<script>alert('x')</script>" in reader.text
    assert "<img src=x onerror=y>" in reader.text
    assert "# <模型>" in reader.text


def test_the_page_loads_nothing(sft: str) -> None:
    assert "http" not in sft
    assert "@import" not in sft
    assert "url(" not in sft


def test_samples_are_marked_by_exact_match_and_long_ones_folded(sft: str) -> None:
    text = read(sft).text
    assert "Before ✗ wrong 28 After ✓ right 35。" in text
    assert "Before ✓ right 10 After ✗ wrong 12" in text
    assert "Before ✗ wrong (empty)" in text
    assert "雷克雅未克" in text
    assert sft.count('<details class="clamp">') == 1
    assert LONG in sft


def test_next_commands_quote_the_folder(sft: str, tmp_path: Path) -> None:
    name = f"'{tmp_path / 'demo run'}'"
    text = read(sft).text
    for command in ("chat {}", "evaluate {} --data", "export {} --merge"):
        assert f"tunewright {command.format(name)}" in text


def test_pretraining_shows_loss_and_perplexity(tmp_path: Path) -> None:
    before, after = {"loss": 8.351, "perplexity": math.exp(8.351)}, {"loss": 1.2, "perplexity": math.exp(1.2)}
    made = stage("pretrain", before=before, after=after, samples=[], artifact="stages/pretrain/model")
    text = read(page(folder(tmp_path / "p", made, events=log("pretrain")))).text
    assert "The held-out loss fell, which is better: 8.351 before, 1.200 after." in text
    assert "Perplexity 3.32 before 4.23 k" in text
    assert "on a logarithmic scale" in text
    assert "Scores per family" not in text
    assert "Samples side by side" not in text
    assert "--merge" not in text


def test_no_evaluation_no_samples_no_held_out_data(tmp_path: Path) -> None:
    data = {"train": dataset("a.jsonl", 8000), "valid": dataset("", 0), "padding_share": 0.0}
    made = stage(before={}, after={}, samples=[], data=data)
    del made["artifact_bytes"]
    text = read(page(folder(tmp_path / "p", made))).text
    assert "Nothing was measured on held-out data. The training loss went from" in text
    assert "Training loss 1." in text


def test_no_events_no_recipe(tmp_path: Path) -> None:
    at = folder(tmp_path / "p", stage(), events=[])
    (at / "recipe.yaml").unlink()
    (at / "events.jsonl").unlink()
    text = read(page(at)).text
    assert "No training steps were recorded." in text
    assert "The full recipe" not in text


def test_only_an_answer_after_training(tmp_path: Path) -> None:
    text = read(page(folder(tmp_path / "p", stage(before={})))).text
    assert "64.2% of 400 held-out questions are answered exactly right. The held-out loss is 1.204." in text
    assert "not asked" in text


def test_a_worse_score_is_called_worse(tmp_path: Path) -> None:
    html = page(folder(tmp_path / "p", stage(before=scores(1, 1.204), after=scores(0, 2.871))))
    text = read(html).text
    assert "64.2% before training: 50.5 percentage points worse." in text
    assert "The held-out loss rose, which is worse" in text
    assert "worse by 50.5 points" in text
    assert 'class="hero worse"' in html


def test_a_small_difference_may_be_chance(tmp_path: Path) -> None:
    before, after = scores(0, 2.0), {**scores(0, 2.0), "exact_match": 0.15}
    text = read(page(folder(tmp_path / "p", stage(before=before, after=after)))).text
    assert "1.2 percentage points better. With 400 questions, a difference this small may be chance." in text
    assert "The held-out loss is unchanged" in text


def test_several_stages_have_a_list_of_contents(tmp_path: Path) -> None:
    first = stage("pretrain", before={}, after={}, samples=[])
    reader = read(page(folder(tmp_path / "p", first, stage("sft"))))
    assert {"#stage-1", "#stage-2", "#next"} <= set(reader.links)
    assert "2 stages" in reader.text


def test_text_that_no_encoding_holds_is_replaced(tmp_path: Path) -> None:
    at = folder(tmp_path / "p", stage())
    results = store.read_record(at / "results.json")
    results["stages"][0]["samples"][0]["after"] = "half a pair: \ud83d"
    sealed = {**results, "sha256": store.sha256_json(results)}
    (at / "results.json").write_text(json.dumps(sealed), encoding="utf-8")
    assert "half a pair: ?" in page(at)


def test_results_that_were_changed_by_hand_make_no_page(tmp_path: Path) -> None:
    at = folder(tmp_path / "p", stage())
    text = (at / "results.json").read_text(encoding="utf-8")
    (at / "results.json").write_text(text.replace("1.204", "0.204"), encoding="utf-8")
    with pytest.raises(DamagedError, match=r"results\.json: it differs from what was written"):
        report.write(at)
    assert not (at / "report.html").exists()


def test_the_last_try_of_a_step_counts_and_what_was_undone_does_not() -> None:
    steps = [("train", 0, 0.0), ("step", 1, 9.0), ("step", 2, 8.0), ("step", 3, 7.0), ("eval", 3, 7.5)]
    again = [("train", 1, 0.0), ("step", 2, 5.0), ("restore", 2, 5.5)]
    events = [{"kind": k, "step": s, "loss": loss, "stage": "a"} for k, s, loss in steps + again]
    history = charts.histories(events)["a"]
    assert history.curve("loss") == [(1, 9.0), (2, 5.0)]
    assert history.held_out == {}
    assert history.resumed == [1]
    assert history.kept == 2


def test_held_out_points_begin_before_training_and_end_with_the_weights_that_were_kept() -> None:
    history = History({n: {"loss": 3.0 - n / 10} for n in range(1, 11)}, {5: 2.2, 10: 2.4}, kept=5)
    drawn = charts.loss_chart(history, {"loss": 3.0}, {"loss": 2.2})
    assert drawn
    assert [title for *_, title in drawn.dots] == ["step 0: 3.0000", "step 5: 2.2000", "step 10: 2.4000"]
    assert [x for x, *_ in drawn.dots] == [0, 50, 100]


def test_numbers_that_are_none_are_left_out_of_curves() -> None:
    history = History()
    history.add({"kind": "step", "step": 1, "loss": math.inf, "lr": 0.1, "margin": 0.5})
    history.add({"kind": "eval", "step": 1, "loss": math.nan})
    assert (history.curve("loss"), history.held_out) == ([], {})
    assert [chart.title for chart in charts.side_charts(history)] == ["Learning rate", "Margin"]


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    thin = charts.thinned([(n, n) for n in range(1, 100_001)])
    assert len(thin) <= 1000
    assert (thin[0], thin[-1]) == ((1, 1), (100_000, 100_000))
    assert charts.thinned([(1, 1), (2, 2)]) == [(1, 1), (2, 2)]


def test_smoothing_keeps_the_ends_and_shifts_nothing() -> None:
    smooth = charts.smoothed([(1, 1.0), (2, 4.0), (3, 1.0), (4, 9.0)], 3)
    assert smooth == [(1, 1), (2, 2), (3, 14 / 3), (4, 9)]
    assert charts.smoothed([], 3) == []


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        (charts.linear(1.13, 2.9), ["1.0", "1.5", "2.0", "2.5", "3.0"]),
        (charts.linear(0, 5e-4), ["0", "0.0001", "0.0002", "0.0003", "0.0004", "0.0005"]),
        (charts.linear(0, 3, least=1), ["0", "1", "2", "3"]),
        (charts.linear(0, 12, least=1), ["0", "5", "10", "15"]),
        (charts.linear(-0.3, 0.4), ["-0.4", "-0.2", "0", "0.2", "0.4"]),
        (charts.linear(0, 8e-6), ["0", "2e-6", "4e-6", "6e-6", "8e-6"]),
        (charts.linear(0, 58_000), ["0", "20 k", "40 k", "60 k"]),
        (charts.linear(2.0, 2.0), ["2.0", "2.5"]),
        (charts.logarithmic(1.2, 8.35), ["1.0", "1.5", "2.0", "3.0", "5.0", "7.0", "10.0"]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(scale: charts.Scale, labels: list[str]) -> None:
    assert scale.labels() == labels


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Change(0.2, 0.5), "better"), (Change(0.5, 0.2), "worse"), (Change(0.5, 0.5001), "unchanged"),
        (Change(2.0, 1.0, lower_is_better=True), "better"), (Change(None, 0.5), ""),
    ],
)  # fmt: skip
def test_verdicts(change: Change, verdict: str) -> None:
    assert change.verdict == verdict


@pytest.mark.parametrize(("share", "said"), [(0, "0.0%"), (2e-6, "<0.01%"), (0.0014, "0.14%"), (1, "100.0%")])
def test_a_small_share_is_not_rounded_to_nothing(tmp_path: Path, share: float, said: str) -> None:
    made = stage(parameters={"total": 10**9, "trainable": 1, "share": share})
    assert f"Trained parameters {said} 1 of 1 B" in read(page(folder(tmp_path / "p", made))).text


def test_what_a_method_says_of_itself_is_shown(tmp_path: Path) -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 12, "model.layers.1.mlp.up_proj": 3}
    html = page(
        folder(tmp_path, stage(method_report={"ranks": ranks, "sparsity": 0.99499, "added_biases": 14}))
    )
    shown = read(html).text
    assert "model.layers.0.self_attn.q_proj" in shown
    assert "0.995" in shown
    assert "Added biases" in shown
    assert "What lora did" in shown
    assert "What lora did" not in page(folder(tmp_path / "plain", stage()))


def test_what_an_objective_tells_of_held_out_data_is_shown(tmp_path: Path) -> None:
    figures = {"accuracy": 0.91, "margin": 1.75, "chosen": 0.5, "rejected": -1.25}
    other = stage(
        "dpo", objective={"name": "dpo", "loss": "sigmoid"}, samples=[],
        before={"loss": 0.693, **dict.fromkeys(figures, 0.0)}, after={"loss": 0.31, **figures},
    )  # fmt: skip
    shown = page(folder(tmp_path / "run", other, events=log("dpo")))
    assert "Accuracy on held-out data rose: 0.0% before, 91.0% after." in shown
    assert "The held-out loss fell, which is better: 0.693 before, 0.310 after." in shown
    assert "Margin" in shown
    assert "nats per learned token" not in shown


def test_rewards_are_told_and_not_their_loss(tmp_path: Path) -> None:
    other = stage("grpo", objective={"name": "grpo"}, samples=[], before={"loss": -0.2, "reward": 0.2},
                  after={"loss": -0.1, "reward": 0.1})  # fmt: skip
    shown = page(folder(tmp_path / "run", other, events=log("grpo")))
    assert "Mean reward on held-out data fell: 0.200 before, 0.100 after." in shown
    assert "Held-out loss" not in shown


def test_numbers_that_differ_by_rounding_make_a_flat_line() -> None:
    scale = charts.linear(3.9999999999999996, 4.0)
    assert scale.ticks[0] <= 4.0 <= scale.ticks[-1]
    assert len(set(scale.ticks)) == len(scale.ticks) >= 2
