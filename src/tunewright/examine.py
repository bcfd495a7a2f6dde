"""What the verbs besides ``run`` do: lint, evaluate, export, list."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunewright import catalogue, methods, objectives
from tunewright.comparison import Questions
from tunewright.compress import merge as merging
from tunewright.core import plugins
from tunewright.core.errors import ModelError, Problem
from tunewright.data import builtin, formats, prepare
from tunewright.data import lint as linting
from tunewright.data.lint import LintReport, Tally
from tunewright.data.rows import Row, Source
from tunewright.data.template import ChatCodec, template_names
from tunewright.models.load import BUILTIN, find, load_tokenizer
from tunewright.objectives import Objective
from tunewright.recipes import DataConfig, EvaluateConfig, plugin_config
from tunewright.serve import speaker as speakers

Tree = dict[str, Any]


def lint(paths: Sequence[str], model: str = "", template: str = "auto", max_length: int = 1024) -> LintReport:
    """Check every row; with a model, also that an assistant token is left within ``max_length``."""
    sources = prepare.sources(DataConfig.model_validate({"train": paths}).train)
    if not model:
        return linting.lint(sources)
    codec = ChatCodec(load_tokenizer(find(model)), template, max_length)
    codec.require_template()
    objective = _objective("sft", codec)
    tally = Tally()
    for _ in tally.watch(_encodable(objective, sources)):
        pass
    return tally.report()


def _objective(name: str, codec: ChatCodec) -> Objective:
    return objectives.create({"name": name}, plugin_config("objectives", {"name": name}), codec)


def _encodable(objective: Objective, sources: Iterable[Source]) -> Iterator[Row | Problem]:
    """Checked rows; those that leave nothing to learn become problems."""
    for source in sources:
        for row in linting.check(formats.read(source)):
            if isinstance(row, Problem):
                yield row
                continue
            made = next(iter(objective.encode([row])), row)
            yield made if isinstance(made, Problem) else row


def lint_json(report: LintReport) -> Tree:
    """The report for machines."""
    problems = [{"where": p.where, "what": p.what, "fix": p.fix} for p in report.problems]
    return {"rows": report.rows, "good": report.good, "problems": problems}


def evaluate(model: str, paths: Sequence[str], limit: int = 400, max_new_tokens: int = 64,
             template: str = "auto") -> Tree:  # fmt: skip
    """Scores of a run, adapter or model on the rows of these files: conversations are answered, too."""
    speaker = speakers.load(model, template=template)
    files = DataConfig.model_validate({"train": paths}).train
    questions = Questions(files, EvaluateConfig(limit=limit, max_new_tokens=max_new_tokens))
    exam = questions.exam(speaker)
    scores = exam.take(speaker.model)
    scores.pop("answers", None)
    return {"model": model, "data": list(paths), "samples": len(exam.samples), **scores}


def score_lines(scores: Tree) -> list[str]:
    """Scores for people."""
    lines = [f"{scores['samples']} samples: held-out loss {scores['loss']:.4f}, "
             f"perplexity {scores['perplexity']:.2f}"]  # fmt: skip
    if "exact_match" in scores:
        families = {"all": scores, **scores["families"]}
        width = max(map(len, families))
        lines += [
            f"{name:<{width}}  exact match {of['exact_match']:6.1%}  F1 {of['f1']:6.1%}  of {of['count']}"
            for name, of in families.items()
        ]
    return lines


def export(model: str, merge: bool, out: Path | None) -> Tree:
    """Copy a run's artifact, or merge its adapter into a plain model folder of the base's dtype."""
    artifact = speakers.artifact_of(model)
    if artifact is None:
        what = f"{model} is neither a run folder nor an adapter"
        raise ModelError(Problem("model", what, "give the folder of a finished run"))
    out = out or Path(f"{str(model).rstrip('/')}-{'merged' if merge else artifact.name}")
    if not merge:
        merging.copy(artifact, out)
        return {"out": str(out)}
    speaker = speakers.load(str(artifact), "fp32")
    if speaker.method is None:
        raise ModelError(Problem("model", f"{artifact} is a whole model already", "leave out --merge"))
    dtype = methods.stored_dtype(speaker.base)
    return {"out": str(out), **merging.merge(speaker.model, speaker.method, speaker.codec, out, dtype)}


def difference_line(result: Tree) -> str:
    """What the check of merged logits found, if there was one."""
    if "merged" not in result:
        return ""
    return f" (logits differ by {result['merged']:.1e} in fp32, {result['saved']:.1e} as saved)"


def listed(what: str) -> list[Tree]:
    """Names with a line on each."""
    if what == "methods":
        return catalogue.method_rows()
    if what in plugins.ROOMS:
        rows = [(name, plugins.summary(plugins.load(what, name))) for name in plugins.names(what)]
    elif what == "models":
        rows = [(f"builtin:{name}", str(folder)) for name, folder in BUILTIN.items()]
    elif what == "data":
        rows = [(f"builtin:{name}", "") for name in builtin.SOURCES]
    else:
        rows = [(name, "") for name in ["auto", *template_names()]]
    return [{"name": name, "summary": summary} for name, summary in rows]
