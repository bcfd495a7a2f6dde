"""The command line: thin verbs. Heavy imports live inside them, so that --help answers at once."""

import atexit
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tunewright.core.errors import InterruptedRunError, TunewrightError, UserError

app = typer.Typer(
    help="Tunewright adapts open language models: one recipe, from data to a usable, measured model.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
_SHOWN_PROBLEMS = 50

Json = Annotated[bool, typer.Option("--json", help="Print one JSON line at the end, and nothing else.")]
Template = Annotated[str, typer.Option(help="Chat template, for models without one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


class Listed(StrEnum):
    """What ``list`` can list."""

    methods = "methods"
    objectives = "objectives"
    regularizers = "regularizers"
    optimizers = "optimizers"
    fast = "fast"
    models = "models"
    templates = "templates"
    data = "data"
    schema = "schema"


class Language(StrEnum):
    """What answers are written in."""

    en = "en"
    zh = "zh"


def _say(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _hear(as_json: bool) -> Callable[[str], None]:
    """What is done meanwhile, beside what is asked for."""
    return (lambda line: None) if as_json else (lambda line: typer.echo(line, err=True))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"), as_json: Json = False
) -> None:
    """Fine-tune the built-in model on built-in data, measure before and after, write a report."""
    began = time.monotonic()  # the imports below are part of what a user waits for
    from tunewright import demo as demonstration
    from tunewright.runs import Run
    from tunewright.train import guard

    guard.Preemption.lasting = True
    result = demonstration.demo(output, _hear(as_json), quiet=as_json)
    result["seconds"] = time.monotonic() - began
    if as_json:
        _say(result)
    else:
        typer.echo("\n".join(demonstration.summary(result, Run(output))))


@app.command()
def run(
    recipe: Path,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an older run aside and start over.")] = False,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Go on although inputs changed.")
    ] = False,
    start: Annotated[
        str, typer.Option("--from", help="Make this stage, and all that depend on it, anew.")
    ] = "",
    only: Annotated[str, typer.Option(help="Only this stage.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Tell what would run, and why; run nothing.")] = False,
    foresight: Annotated[
        bool, typer.Option("--foresight/--no-foresight", help="Warn of too little memory before training.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Run a recipe; running it again resumes it. Dials: train.lr=1e-4 data.train=my.jsonl output=runs/x."""
    from tunewright import agenda, pipeline
    from tunewright.auto import Advisor
    from tunewright.train import guard

    guard.Preemption.lasting = True
    advisor = Advisor(fresh, _hear(as_json), dry=plan)
    loaded, wish = pipeline.load(recipe, overrides or [], advisor), agenda.Wish(start, only)
    if plan:
        tasks = pipeline.plan(loaded, wish, allow_drift)
        told = [{"stage": task.name, "action": task.action, "why": task.why} for task in tasks]
        _say({"status": "planned", "stages": told}) if as_json else typer.echo("\n".join(agenda.lines(tasks)))
        return
    finished = pipeline.run(
        loaded, quiet=as_json, fresh=fresh, allow_drift=allow_drift, wish=wish, foresees=foresight
    )
    if as_json:
        _say({"run": str(finished.folder), "status": "finished", "results": finished.results})
    else:
        typer.echo(f"Report: {finished.report}\nNext:   tunewright chat {finished.folder}")


@app.command()
def advise(
    asked: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...")] = None,
    apply: Annotated[
        Path | None, typer.Option("--apply", help="Write the recipe of the choice here.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Try the best plans for a few steps, and correct the prediction.")
    ] = False,
    rates: Annotated[
        bool, typer.Option("--rates/--no-rates", help="Whether --probe also tries learning rates.")
    ] = True,
    lang: Annotated[Language, typer.Option("--lang", help="Language of the answer.")] = Language.en,
    as_json: Json = False,
) -> None:
    """Which method fits model, data and devices: model=FOLDER data=my.jsonl goal=memory devices=1x24GB deadline=2h."""
    from tunewright import advise as advisors

    recipe, *pairs = asked if asked and "=" not in asked[0] else ["", *(asked or [])]
    answer = advisors.answer(recipe, pairs)
    if probe:
        from tunewright.probe import probed

        answer = probed(answer, _hear(as_json), rates=rates)
    if not as_json:
        typer.echo("\n".join(answer.lines(lang.value)))
    if apply:
        answer.write(apply, lang.value)
    if as_json:
        _say(answer.to_json())
    elif apply:
        typer.echo(f"Wrote {apply}\nNext:   tunewright run {apply}")


@app.command()
def lint(
    data: list[str],
    model: Annotated[str, typer.Option(help="Also check that answers fit this model's max length.")] = "",
    template: Template = "auto",
    max_length: Annotated[int, typer.Option(help="Longest sample in tokens, with --model.")] = 1024,
    as_json: Json = False,
) -> None:
    """Check data files and folders: file:line, what is wrong, how to fix it. Exit code 2 if anything is."""
    from tunewright import linting

    report = linting.lint(data, model, template, max_length)
    if as_json:
        _say(linting.to_json(report))
    else:
        _show_problems([str(problem) for problem in report.problems], typer.echo)
        typer.echo("\n".join(report.lines()))
    raise typer.Exit(2 if report.problems else 0)


@app.command()
def evaluate(
    model: str,
    data: Annotated[list[str], typer.Option("--data", help="Held-out file; may be given several times.")],
    limit: Annotated[int, typer.Option(help="At most so many answers.")] = 400,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    template: Template = "auto",
    as_json: Json = False,
) -> None:
    """Score a run, adapter or model on a file: held-out loss, exact match, F1, per family."""
    from tunewright import examine

    scores = examine.evaluate(model, data, limit, max_new_tokens, template)
    if as_json:
        _say(scores)
    else:
        typer.echo("\n".join(examine.score_lines(scores)))


@app.command()
def compare(
    what: Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]... | MODEL MODEL...")],
    method: Annotated[
        str, typer.Option(help="Methods, with commas between; the recipe's own if not given.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Runs of each, from the recipe's seed on.")] = 1,
    budget: Annotated[str, typer.Option(help="Training time of each run, such as 90s, 5m, 1.5h.")] = "",
    sweep: Annotated[
        list[str] | None, typer.Option(help="KEY=A,B,C: each value; may be given several times.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Held-out file, for runs and models.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the comparison; runs/compare-NAME if not given.")] = "",
    as_json: Json = False,
) -> None:
    """Try methods on the same data, seeds and budget, or ask finished runs and models the same; one report."""
    from tunewright import head_to_head
    from tunewright.train import guard

    guard.Preemption.lasting = True
    tell = (lambda words: None) if as_json else typer.echo
    choice = head_to_head.Choice([name for name in method.split(",") if name], seeds, budget, sweep or ())
    compared = head_to_head.of_anything(what, choice, data or (), out, tell)
    if as_json:
        _say({"status": "finished", "folder": str(compared.folder), **compared.results})
    else:
        typer.echo("\n".join([*compared.results["verdict"]["en"], f"Report: {compared.report}"]))


@app.command()
def chat(
    model: str,
    prompt: Annotated[str, typer.Option(help="Answer this and leave.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    template: Template = "auto",
    as_json: Json = False,
) -> None:
    """Talk to a run, adapter or model."""
    from tunewright.serve import speaker as speakers
    from tunewright.serve.chat import converse

    speaker = speakers.load(model, template=template)
    speaker.codec.require_template()
    asked = iter([prompt] if prompt else [])
    said: list[str] = []

    def ask() -> str:
        if not prompt:
            return str(input("> "))
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    converse(speaker, ask, said.append if prompt else typer.echo, system, max_new_tokens)
    if prompt:
        answer = said[-1]
        _say({"prompt": prompt, "answer": answer}) if as_json else typer.echo(answer)


@app.command()
def export(
    model: str,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into a plain model folder.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's adapter or model to a folder of its own; --merge makes a plain Hugging Face model."""
    from tunewright import examine

    result = examine.export(model, merge, out)
    _say(result) if as_json else typer.echo(f"Wrote {result['out']}" + examine.difference_line(result))


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(help="Run folder; without it, this machine.")] = None,
    as_json: Json = False,
) -> None:
    """Verify every hash in a run folder and say what can be resumed. Exit code 1 if anything is damaged."""
    from tunewright import doctor as doctors

    if run is None:
        here = doctors.environment()
        _say(here) if as_json else typer.echo("\n".join(doctors.environment_lines(here)))
        return
    found = doctors.examine(run)
    _say(found.to_json()) if as_json else typer.echo("\n".join(found.lines()))
    raise typer.Exit(1 if found.damaged else 0)


@app.command("list")
def list_(what: Listed, as_json: Json = False) -> None:
    """List methods, objectives, regularizers, optimizers, models, templates or data; or print the recipe's JSON schema."""
    from tunewright import listing

    if what is Listed.schema:
        from tunewright.recipes import schema_json

        typer.echo(json.dumps(schema_json(), indent=None if as_json else 2))
        return
    rows = listing.listed(what.value)
    if as_json:
        _say(rows)
    elif what is Listed.methods:
        from tunewright import catalogue

        typer.echo(catalogue.method_table(rows))
    else:
        typer.echo("\n".join(listing.lines(rows)))


def _show_problems(problems: list[str], show: Callable[[str], None]) -> None:
    for problem in problems[:_SHOWN_PROBLEMS]:
        show(problem)
    if len(problems) > _SHOWN_PROBLEMS:
        show(f"... and {len(problems) - _SHOWN_PROBLEMS} more problems")


def _report(error: TunewrightError | InterruptedRunError) -> None:
    problems = [str(p) for p in error.problems] if isinstance(error, UserError) else [str(error)]
    if "--json" in sys.argv:
        _say({"status": "failed", "problems": problems})
    _show_problems([f"error: {p}" for p in problems], lambda line: typer.echo(line, err=True))


def main() -> None:
    """Run a verb; a mistake of the user's is told without a traceback and exits with code 2."""
    # Else Python searches half a million objects for garbage at its end, which takes more than a second.
    atexit.register(gc.freeze)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        app()
    except (TunewrightError, InterruptedRunError) as error:
        _report(error)
        sys.exit(error.exit_code)
