"""The benchmark: its workloads, what it makes, how it goes on after a stop, and that its page is what was measured."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a package of the repository, not of what is installed

from benchmarks import figures, launch, matmul, models, page, plan, rows, tables, targets  # noqa: E402
from benchmarks.journal import Journal  # noqa: E402
from benchmarks.systems._work import PEER_SETTINGS  # noqa: E402
from benchmarks.wording import SYSTEMS, WORDS  # noqa: E402
from tunewright.data.rows import Message, Row  # noqa: E402
from tunewright.data.template import ChatCodec  # noqa: E402

Tree = dict[str, Any]
TUNED = {"trl-best": {"a": {"args": {"bf16": True}}, "e": {}}}
ROWS = [
    {"messages": [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]},
    {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello there, friend."}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def workloads() -> Tree:
    return plan.load()


def run_of(job: plan.Job, seconds: float, memory: int = 10**9, snapshots: tuple[float, ...] = ()) -> Tree:
    """A log entry of a run of two epochs of 100 tokens in four steps."""
    steps = [[seconds * share, 50] for share in (0.4, 0.6, 0.7, 0.8)]
    result = {"steps": steps, "first_step": 1.0, "saved": seconds, "artifact": "", "versions": {"torch": "2"}}
    facts = {"rows": 2, "tokens": 100, "supervised": 60, "squares": 5000}
    return {
        "key": job.key, "seconds": seconds + 1, "peak_memory": memory, "at": 1.7e9 + seconds, "commit": "abc",
        "facts": {"train": facts, "held_out": {"rows": 2}, "config": {}},
        "result": {**result, "snapshots": [[moment, ""] for moment in snapshots]},
    }  # fmt: skip


def test_every_name_in_the_workloads_is_known(workloads: Tree) -> None:
    for name, workload in workloads["workloads"].items():
        cases = workload.get("cases", {"": {}})
        systems = {s for case in cases.values() for s in {**workload, **case}["systems"]}
        assert systems <= workloads["systems"].keys(), name
        assert workload["model"] in workloads["models"]
        assert workload["title"].keys() == WORDS.keys()
        for target in workload.get("targets", ()):
            assert {target.get("case", ""), target.get("against_case", "")} <= {"", *cases}
            assert target.get("against", "tunewright") in systems
            assert len({"at_least", "at_most", "within"} & target.keys()) == 1
            assert all(target["what"] in words["what"] for words in WORDS.values())
    assert all(named.keys() == workloads["systems"].keys() for named in SYSTEMS.values())
    assert {name for name, about in workloads["systems"].items() if about.get("tuned")} == workloads[
        "candidates"
    ]["peers"].keys()


def test_every_candidate_sets_what_a_peer_knows(workloads: Tree) -> None:
    for system, groups in workloads["candidates"]["peers"].items():
        for group in groups:
            assert all(option.keys() <= PEER_SETTINGS for option in group["options"]), (system, group["name"])
    assert workloads["candidates"]["rows"].keys() <= workloads["workloads"].keys()


def test_the_targets_are_those_of_the_issue(workloads: Tree) -> None:
    asked = {
        (name, target["what"], target.get("against", target.get("against_case", ""))): target.get(
            "at_least", target.get("at_most", target.get("within"))
        )
        for name, workload in workloads["workloads"].items()
        for target in workload.get("targets", ())
    }
    speed, memory = "tokens_per_second", "peak_memory"
    assert asked == {
        ("a", speed, "trl"): 10, ("a", speed, "trl-best"): 1.5, ("a", memory, "trl"): 0.2,
        ("b", speed, "trl"): 4, ("b", speed, "trl-best"): 1.3, ("b", memory, "trl"): 0.5,
        ("c", speed, "trl"): 8, ("c", speed, "trl-best"): 1.5, ("c", memory, "trl"): 0.25,
        ("d", "later_epochs", "lora"): 3,
        ("e", "time_to_loss", "trl"): 5, ("e", "time_to_loss", "trl-best"): 1.5,
        ("g", speed, "trl"): 4, ("g", speed, "trl-best"): 1.5, ("h", speed, "trl"): 3,
        ("a", "utilisation", ""): 0.4, ("a", "first_step", ""): 6,
        **{(name, "held_out_loss", "tunewright-plain"): 0.01 for name in "abcd"},
    }  # fmt: skip


def test_systems_run_in_turn(workloads: Tree) -> None:
    wanted = {"workloads": ["a"], "systems": ["tunewright", "trl", "trl-best"], "repeats": 2}
    order = [(job.system, job.repeat) for job in plan.jobs(workloads, wanted, TUNED)]
    turn = ["tunewright", "trl", "trl-best"]
    assert order == [(name, 0) for name in turn] + [(name, 1) for name in turn]


def test_a_peer_without_settings_is_left_out(workloads: Tree) -> None:
    assert not any(job.system == "hf-best" for job in plan.jobs(workloads, {}, TUNED))
    assert "hf-best on a" in plan.untuned(workloads, TUNED, ["a"])
    assert "trl-best on a" not in plan.untuned(workloads, TUNED, ["a"])


def test_what_is_best_for_a_peer_is_kept_by_processor(tmp_path: Path) -> None:
    kept = tmp_path / "peers.json"
    assert plan.tuned("cpu amx_bf16", kept) == {}
    plan.keep_tuned("cpu amx_bf16", "trl-best", "a", {"args": {}}, kept)
    plan.keep_tuned("cpu amx_bf16", "trl-best", "c", {"env": {}}, kept)
    plan.keep_tuned("cpu avx512_bf16", "hf-best", "a", {"load": {}}, kept)
    assert plan.tuned("cpu amx_bf16", kept) == {"trl-best": {"a": {"args": {}}, "c": {"env": {}}}}
    assert plan.tuned("cpu avx512_bf16", kept) == {"hf-best": {"a": {"load": {}}}}
    assert plan.tuned("cpu", kept) == {}


def test_settings_that_are_committed_are_for_systems_and_workloads_that_there_are(workloads: Tree) -> None:
    for place, found in json.loads(plan.TUNED.read_text(encoding="utf-8")).items():
        assert place.split()[0] in {"cpu", "gpu"}
        for system, settings in found.items():
            assert workloads["systems"][system]["tuned"]
            assert settings.keys() <= workloads["workloads"].keys()


def test_fewer_rows_leave_the_held_out_rows_as_they_are(workloads: Tree) -> None:
    few, whole = (
        plan.jobs(workloads, {"workloads": ["a"], "rows": n}, {})[0].work["data"] for n in (8, None)
    )
    assert (few["rows"], whole["rows"]) == (8, 256)
    assert few["held_out_from"] == whole["held_out_from"] == 256


def test_a_run_counts_for_its_own_settings_only(workloads: Tree) -> None:
    wanted = {"workloads": ["a"], "systems": ["trl-best"], "repeats": 1}
    one, other = (
        plan.jobs(workloads, wanted, {"trl-best": {"a": {"args": {"bf16": on}}}})[0] for on in (True, False)
    )
    assert one.name == other.name
    assert one.key != other.key


@pytest.mark.parametrize(
    ("name", "parameters"), [("smollm2-135m", 134_515_008), ("qwen2.5-0.5b", 494_032_768)]
)
def test_the_shapes_are_those_of_the_real_models(workloads: Tree, name: str, parameters: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**workloads["models"][name]["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    sizes = {key.split(".")[-1].split("_")[0]: tuple(m.weight.shape) for key, m in model.model.layers[0].named_modules()
             if isinstance(m, torch.nn.Linear)}  # fmt: skip
    assert {name: (o, i) for name, i, o in matmul.linears(config.to_dict())} == sizes


def test_models_and_rows_are_made_once(workloads: Tree, shared_fixtures: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    spec = workloads["models"]["smollm2-135m"]
    spec = {**spec, "config": {**spec["config"], "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}}  # fmt: skip
    data = {"files": ["alpaca_en_demo"], "rows": 3, "held_out": 2, "held_out_from": 5, "max_length": 64}
    made = models.prepare(tmp_path, "tiny", spec, data, shared_fixtures)
    weights = Path(made["model"]) / "model.safetensors"
    when = weights.stat().st_mtime_ns
    assert {str(tensor.dtype) for tensor in load_file(weights).values()} == {"torch.bfloat16"}
    assert made["facts"]["train"]["rows"] == 3
    assert (
        models.prepare(tmp_path, "tiny", spec, {**data, "rows": 4}, shared_fixtures)["held_out"]
        != made["held_out"]
    )
    assert models.prepare(tmp_path, "tiny", spec, data, shared_fixtures) == made
    assert weights.stat().st_mtime_ns == when
    shuffled = [row["messages"] for name in ("train", "held_out") for row in rows.read(made[name])]
    assert len({json.dumps(row) for row in shuffled}) == 5
    tokenizer = AutoTokenizer.from_pretrained(made["model"])
    text = tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False)
    assert text.endswith("<|im_start|>assistant\nFour.<|im_end|>")
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_what_is_scored_is_what_ours_learns(tokenizer: Any) -> None:
    turns = [tuple(Message(**message) for message in row["messages"]) for row in ROWS]
    expected = ChatCodec(tokenizer).encode_many([Row("", turn) for turn in turns])
    for sample, (ids, learned) in zip(rows.encode(tokenizer, ROWS, 1024), expected, strict=True):
        assert sample["input_ids"] == ids
        assert [int(label != rows.IGNORED) for label in sample["labels"]] == learned
    cut = next(rows.encode(tokenizer, ROWS, 5))
    assert len(cut["input_ids"]) == len(cut["labels"]) == 5


def test_the_log_goes_on_where_it_stopped(workloads: Tree, tmp_path: Path) -> None:
    jobs = plan.jobs(workloads, {"workloads": ["a"], "systems": ["tunewright", "trl"], "repeats": 1}, {})
    journal = Journal(tmp_path / "cpu.jsonl")
    journal.add("run", **run_of(jobs[0], 10.0))
    journal.add("losses", key=jobs[0].key, losses=[2.0])
    journal.add("run", key=jobs[1].key, seconds=3.0, peak_memory=1, failed="out of memory")
    with journal.path.open("a") as log:
        log.write('{"kind": "run", "key": "half a li')
    again = Journal(journal.path)
    assert [again.has(job.key) for job in jobs] == [True, False]
    assert again.losses == {jobs[0].key: [2.0]}
    again.add("run", **run_of(jobs[1], 20.0))
    assert Journal(journal.path).has(jobs[1].key)


def test_figures_of_a_run(workloads: Tree) -> None:
    job = plan.jobs(workloads, {"workloads": ["e"], "systems": ["tunewright"]}, {})[0]
    found = figures.of_run(run_of(job, 10.0), [2.5, 2.0], {**job.work, "epochs": 2}, 1e12)
    assert found["tokens_per_second"] == 200 / 10
    assert found["steady"] == pytest.approx(150 / 4)
    assert found["later_epochs"] == pytest.approx(100 / 2)
    assert found["held_out_loss"] == 2.0
    assert "utilisation" not in found
    padded = run_of(job, 10.0)
    padded["result"]["steps"] = [[moment, 2 * tokens] for moment, tokens in padded["result"]["steps"]]
    assert figures.of_run(padded, None, {**job.work, "epochs": 2}, None)["steady"] == pytest.approx(150 / 4)


def test_time_to_an_equal_loss(workloads: Tree, tmp_path: Path) -> None:
    ours, theirs = plan.jobs(
        workloads, {"workloads": ["e"], "systems": ["tunewright", "trl"], "repeats": 1}, {}
    )
    journal = Journal(tmp_path / "cpu.jsonl")
    journal.add("run", **run_of(ours, 10.0, snapshots=(2.0, 4.0)))
    journal.add("losses", key=ours.key, losses=[3.0, 1.9, 1.5])
    journal.add("run", **run_of(theirs, 40.0, snapshots=(10.0, 20.0)))
    journal.add("losses", key=theirs.key, losses=[4.0, 2.0, 2.1])
    found = figures.summary([ours, theirs], journal, {})
    medians = {s: one["figures"]["time_to_loss"]["median"] for s, one in found["workloads"]["e"][""].items()}
    assert medians == {"tunewright": 4.0, "trl": 20.0}
    judged = {
        target.get("against"): target
        for target in targets.judged(workloads, found)
        if target["workload"] == "e"
    }
    assert (judged["trl"]["reached"], judged["trl"]["met"]) == (5.0, True)
    assert judged["trl-best"]["met"] is None


def test_the_work_that_counts_is_what_a_model_multiplies() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids_BT = torch.arange(24)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    needed = matmul.training_flop(config.to_dict(), {"tokens": 24, "supervised": 24, "squares": 24**2}, 0)
    whole_square = (
        6 * config.num_hidden_layers * config.hidden_size * 24**2
    )  # eager multiplies the masked half too
    rotary = 2 * 24 * 4
    assert counter.get_total_flops() == pytest.approx(needed + whole_square, abs=rotary)


def test_memory_of_the_whole_tree_and_a_limit_in_time(tmp_path: Path) -> None:
    fill = "x = bytearray(b'1' * 80_000_000); import time; time.sleep(0.4)"
    both = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {fill!r}]); {fill}; p.wait()"
    ended, peak = launch.watch(subprocess.Popen([sys.executable, "-c", both]), time.time() + 20)
    assert ended == 0
    assert 160e6 < peak < 400e6
    ended, _ = launch.watch(
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]), time.time()
    )
    assert ended is None


def test_settings_of_the_shell_do_not_reach_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env = launch.environment(tmp_path, {"KMP_BLOCKTIME": "1"}, None, "cpu")
    assert not {"GLIBC_TUNABLES", "OMP_NUM_THREADS"} & env.keys()
    assert (env["KMP_BLOCKTIME"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def test_systems_that_were_not_run_again_keep_what_was_found_before() -> None:
    def of(**systems: int) -> Tree:
        return {"": {name: {"figures": {"seconds": value}} for name, value in systems.items()}}

    earlier = {"commit": "old", "workloads": {"a": of(ours=1, trl=2), "b": of(ours=3)}}
    now = {"commit": "new", "workloads": {"c": of(ours=4), "a": of(ours=5)}}
    both = figures.beside(now, earlier, "abc")
    assert both["commit"] == "new"
    assert list(both["workloads"].items()) == [("a", of(ours=5, trl=2)), ("b", of(ours=3)), ("c", of(ours=4))]
    assert figures.beside(now, {}, "abc")["workloads"] == now["workloads"]
    now["workloads"]["a"][""]["ours"]["figures"]["goal"] = 6.0  # a loss that these systems reach
    assert list(figures.beside(now, earlier, "abc")["workloads"]["a"][""]) == ["ours"]


def test_what_was_measured_is_told_with_the_commit_it_was_run_at(workloads: Tree, tmp_path: Path) -> None:
    wanted = {"workloads": ["a", "c"], "systems": ["tunewright", "trl"], "repeats": 2}
    jobs, journal = plan.jobs(workloads, wanted, {}), Journal(tmp_path / "cpu.jsonl")
    for at, job in enumerate(jobs):
        commit = "new" if (job.workload, job.system) == ("c", "trl") or job.repeat else "old"
        journal.add("run", **{**run_of(job, 10.0), "at": 1.7e9 + at * 86400, "commit": commit})
    found = figures.summary(jobs, journal, {})
    assert (found["commit"], found["when"]) == ("new", "2023-11-21")
    assert [list(tables.commits(found["workloads"][name]).values()) for name in "ac"] == [
        ["new (2023-11-17) tunewright ×1, trl ×1", "old (2023-11-15) tunewright ×1, trl ×1"],
        ["new (2023-11-21) tunewright ×1, trl ×2", "old (2023-11-18) tunewright ×1"],
    ]
    assert figures.summary([], journal, {})["commit"] == figures.commit()


@pytest.mark.parametrize("language", list(page.PAGES))
def test_the_page_is_what_was_measured(workloads: Tree, language: str) -> None:
    written = (ROOT / "docs" / page.PAGES[language]).read_text(encoding="utf-8")
    assert written == page.text(language, page.load(), workloads), "run python -m benchmarks.run --page"


@pytest.mark.parametrize("language", list(page.PAGES))
def test_a_page_with_figures(workloads: Tree, tmp_path: Path, language: str) -> None:
    wanted = {"workloads": ["a"], "systems": ["tunewright", "trl", "hf"], "repeats": 1}
    ours, trl, hf = plan.jobs(workloads, wanted, {})
    journal = Journal(tmp_path / "cpu.jsonl")
    journal.add("rates", square=2e12, own_shapes=1.5e12)
    journal.add("run", **run_of(ours, 10.0, memory=2 * 10**9))
    journal.add("run", **run_of(trl, 200.0, memory=8 * 10**9))
    journal.add(
        "run",
        **{key: value for key, value in run_of(hf, 1.0).items() if key != "result"},
        failed="exit status 1\n  5%|\nMemoryError: no | memory\n",
    )
    found = figures.summary([ours, trl, hf], journal, {"caches": "cold", "threads": None})
    text = page.text(language, {"cpu amx_bf16": found}, workloads)
    met = WORDS[language]["yes"], WORDS[language]["no"]
    assert f"≥ 10.00x | 20.00x | {met[0]} |" in text
    assert f"≤ 0.20x | 0.25x | {met[1]} |" in text
    assert "2.00 TFLOP/s" in text
    assert "MemoryError: no \\| memory" in text
    assert WORDS[language]["elsewhere"] not in text
    both = page.text(language, {"cpu": found, "cpu amx_bf16": found}, workloads)
    assert both.count(f"≤ 0.20x | 0.25x | {met[1]} |") == 2
    assert (
        both.index("amx_bf16\n")
        < both.index(WORDS[language]["no_bf16"])
        < both.index(WORDS[language]["elsewhere"])
    )


def test_results_of_different_processors_are_kept_apart() -> None:
    both = {"extensions": ["amx_bf16", "avx512_bf16"]}
    assert figures.place("cpu", both) == "cpu amx_bf16"
    assert figures.place("cpu", {"extensions": both["extensions"][1:]}) == "cpu avx512_bf16"
    assert figures.place("cpu", {"extensions": []}) == "cpu"
    assert figures.place("gpu", both) == "gpu"
