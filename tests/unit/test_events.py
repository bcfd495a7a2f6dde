"""One stream of events: written a line each, handed to readers, read again after a crash."""

from pathlib import Path

import pytest

from tunewright.core.events import Event, EventLog, read


class Collector:
    """A reader that keeps what it is handed."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.closed = False

    def __call__(self, event: Event) -> None:
        self.seen.append(event)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def test_events_are_read_back_in_order(path: Path) -> None:
    log = EventLog(path)
    log.emit("start", model="é")
    log.emit("step", step=1, loss=2.5)
    log.close()
    first, second = read(path)
    assert (first["kind"], first["model"]) == ("start", "é")
    assert (second["kind"], second["step"], second["loss"]) == ("step", 1, 2.5)
    assert first["time"] <= second["time"]


def test_an_event_is_on_disk_as_soon_as_it_is_emitted(path: Path) -> None:
    log = EventLog(path)
    emitted = log.emit("step", step=1)
    assert list(read(path)) == [emitted]
    log.close()


def test_every_reader_is_handed_every_event_and_is_closed(path: Path) -> None:
    one, two, plain = Collector(), Collector(), []
    log = EventLog(path, one, two, plain.append)
    event = log.emit("start")
    log.close()
    assert one.seen == two.seen == plain == [event]
    assert one.closed
    assert two.closed


def test_the_context_marks_events_and_a_fact_overrules_it(path: Path) -> None:
    log = EventLog(path)
    log.emit("start")
    log.context = {"stage": "sft"}
    log.emit("step", step=1)
    log.emit("step", stage="other")
    log.close()
    assert [event.get("stage") for event in read(path)] == [None, "sft", "other"]


def test_a_second_run_appends(path: Path) -> None:
    for kind in ("first", "second"):
        log = EventLog(path)
        log.emit(kind)
        log.close()
    assert [event["kind"] for event in read(path)] == ["first", "second"]


def test_every_cut_of_the_last_line_is_survived(path: Path) -> None:
    log = EventLog(path)
    log.emit("whole")
    log.emit("cut", text="日本")
    log.close()
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for length in range(start, len(content) - 1):
        path.write_bytes(content[:length])
        log = EventLog(path)
        log.emit("after")
        log.close()
        assert [event["kind"] for event in read(path)] == ["whole", "after"], length


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert list(read(tmp_path / "events.jsonl")) == []


def test_an_event_whose_bytes_were_changed_is_passed_over(path: Path) -> None:
    log = EventLog(path)
    for step in (1, 2, 3):
        log.emit("step", step=step, loss=0.5)
    log.close()
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 9'))
    assert [event["step"] for event in read(path)] == [1, 3]


def test_two_logs_of_one_file_do_not_mix_their_lines(path: Path) -> None:
    one, other = EventLog(path), EventLog(path)
    for step in range(50):
        one.emit("step", step=step, text="x" * 10_000)
        other.emit("eval", step=step)
    assert [(event["kind"], event["step"]) for event in read(path)] == [
        (kind, step) for step in range(50) for kind in ("step", "eval")
    ]
