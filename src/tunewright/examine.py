"""What is done with a result: evaluate, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright import methods
from tunewright.comparison import Questions
from tunewright.compress import merge as merging
from tunewright.core.errors import ModelError, Problem
from tunewright.recipes import DataConfig, EvaluateConfig
from tunewright.serve import speaker as speakers

Tree = dict[str, Any]


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
