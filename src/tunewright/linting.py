"""Every row looked at, and what is wrong with it told. Without a model nothing heavy is loaded."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tunewright.core.errors import Problem
from tunewright.data import formats, prepare
from tunewright.data import lint as linting
from tunewright.data.lint import LintReport, Tally
from tunewright.data.rows import Row, Source
from tunewright.recipes import DataConfig, plugin_config


def lint(paths: Sequence[str], model: str = "", template: str = "auto", max_length: int = 1024) -> LintReport:
    """Check every row; with a model, also that an assistant token is left within ``max_length``."""
    sources = prepare.sources(DataConfig.model_validate({"train": paths}).train)
    if not model:
        return linting.lint(sources)
    tally = Tally()
    for _ in tally.watch(_encodable(_sft(model, template, max_length), sources)):
        pass
    return tally.report()


def _sft(model: str, template: str, max_length: int) -> Any:
    from tunewright import objectives
    from tunewright.data.template import ChatCodec
    from tunewright.models.load import find, load_tokenizer

    codec = ChatCodec(load_tokenizer(find(model)), template, max_length)
    codec.require_template()
    choice = {"name": "sft"}
    return objectives.create(choice, plugin_config("objectives", choice), codec)


def _encodable(objective: Any, sources: Iterable[Source]) -> Iterator[Row | Problem]:
    """Checked rows; those that leave nothing to learn become problems."""
    for source in sources:
        for row in linting.check(formats.read(source)):
            if isinstance(row, Problem):
                yield row
                continue
            made = next(iter(objective.encode([row])), row)
            yield made if isinstance(made, Problem) else row


def to_json(report: LintReport) -> dict[str, Any]:
    """The report for machines."""
    problems = [{"where": p.where, "what": p.what, "fix": p.fix} for p in report.problems]
    return {"rows": report.rows, "good": report.good, "problems": problems}
