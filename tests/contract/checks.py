"""What every method keeps on every architecture: plain functions of a lesson."""

from collections.abc import Callable
from math import isfinite

import pytest
import torch
from elsewhere import logits
from lessons import STEPS, Lesson, Tensors, Watch
from safetensors.torch import load_file
from school import School

from tunewright import methods
from tunewright.core.errors import ModelError
from tunewright.models.load import find, load_model

Check = Callable[[Lesson], None]
EXACT, SUMMED, MERGED = 1e-5, 1e-6, 1e-4
"""Largest differences: of what is computed in the same order, of sums in another order (as a share of the
gradient's norm), of logits after weights were merged in fp32.
"""
_NAME = 400
"""Bytes that a tensor's name, dtype, shape and place take in a file, at most."""
_SAFE = {".safetensors", ".json"}


def refuses_in_advance(school: School, method: str, architecture: str) -> None:
    """What cannot be used is told from the outline already, with the reason and what to do instead."""
    if school(method, architecture) is not None:
        return
    made = methods.kind(method)(school.options(method, architecture))
    told = made.problems(school.outline(architecture))
    with pytest.raises(ModelError) as refused:
        made.apply(school.base(made, architecture, "fp32"))
    assert list(refused.value.problems) == told
    assert all(problem.where.startswith("method") and problem.what and problem.fix for problem in told)


def fits_what_it_says_it_fits(lesson: Lesson) -> None:
    """The real model is not refused where its outline is not."""
    assert lesson.method.problems(lesson.base()) == []


def begins_as_the_base(lesson: Lesson) -> None:
    """Outputs are the base's own until the first step, if the method says so; never are they broken."""
    assert torch.isfinite(lesson.trained.at_start).all()
    if lesson.method_class.starts_equal:
        torch.testing.assert_close(lesson.trained.at_start, logits(lesson.base()), atol=EXACT, rtol=0)


def changes_what_it_declares_and_nothing_else(lesson: Lesson) -> None:
    """Parameters that did not require gradients at the start are the same to the bit; the others learn."""
    taught = lesson.trained
    after = dict(taught.model.named_parameters())
    changed = {name for name, before in taught.before.items() if not torch.equal(after[name], before)}
    assert not changed - taught.declared.keys(), (
        f"{lesson} changed {sorted(changed - taught.declared.keys())}"
    )
    assert changed, f"{lesson} changed nothing"
    assert (taught.at_end - taught.at_start).abs().max() > 1e-4


def gives_gradients_to_all_that_it_trains(lesson: Lesson) -> None:
    """Finite ones in every step, and in some step one that is not zero, for what required one in any step."""
    watch = lesson.trained.watch
    assert not watch.not_finite, f"{lesson}: {sorted(watch.not_finite)}"
    assert len(watch.losses) == STEPS
    assert all(map(isfinite, watch.losses))
    assert watch.required, f"{lesson} trains nothing"
    unreached = sorted(watch.required - watch.reached)
    assert not unreached, f"{lesson}: no gradient ever reached {unreached}"


def counts_what_it_trains(lesson: Lesson) -> None:
    """The count from an outline is that from a model, and that of the parameters which may be trained."""
    trained = sum(parameter.numel() for parameter in lesson.trained.declared.values())
    assert lesson.method.count(lesson.outline) == trained
    assert lesson.method.count(lesson.base()) == trained


def comes_back_in_another_process(lesson: Lesson) -> None:
    """What was exported gives the same logits where nothing is known of the training."""
    for taught in (lesson.trained, lesson.half):
        torch.testing.assert_close(taught.logits_elsewhere(), taught.at_end, atol=EXACT, rtol=0)


def merges_or_says_why_not(lesson: Lesson) -> None:
    """A plain transformers model with the same logits, also after it was saved; or a reason."""
    kind, taught = lesson.method_class, lesson.trained
    loaded = kind.load(lesson.base(), taught.saved)
    reason = kind.keeps_apart(loaded)
    assert reason or not kind.facts.keeps_apart
    if reason:
        with pytest.raises(ModelError) as refused:
            kind.merge(loaded)
        assert reason.en in str(refused.value)
        return
    merged, folder = kind.merge(loaded), lesson.folder / "merged"
    assert type(merged) is lesson.school.plain_class(lesson.architecture)
    torch.testing.assert_close(logits(merged), taught.at_end, atol=MERGED, rtol=0)
    merged.save_pretrained(folder)
    again = load_model(find(str(folder)))
    torch.testing.assert_close(logits(again), taught.at_end, atol=MERGED, rtol=0)


def saves_what_it_trains_and_no_more(lesson: Lesson) -> None:
    """The bytes on disk are those of the trained numbers, or of the whole model; names come on top."""
    paths, numbers = sorted(lesson.trained.saved.rglob("*.safetensors")), _numbers_saved(lesson)
    tensors = [tensor for path in paths for tensor in load_file(path).values()]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held == pytest.approx(4 * numbers, rel=0.05), f"{lesson} saves {held} bytes for {numbers} numbers"
    assert sum(path.stat().st_size for path in paths) - held <= _NAME * (len(tensors) + len(paths))
    others = {path.suffix for path in lesson.trained.saved.rglob("*") if path.is_file()} - _SAFE
    assert not others, f"{lesson} saves files that are {', '.join(others)}"


def _numbers_saved(lesson: Lesson) -> int:
    if lesson.method_class.folder == "model":
        return sum(parameter.numel() for parameter in lesson.outline.parameters())
    return lesson.trained.method.saved(lesson.trained.model)


def may_recompute_its_activations(lesson: Lesson) -> None:
    """Gradient checkpointing gives the same loss and gradients."""
    plain, recomputed = lesson.midway.gradients(), lesson.midway.gradients_recomputed()
    assert recomputed[0] == pytest.approx(plain[0], rel=EXACT)
    _same_gradients(recomputed[1], plain[1], EXACT)


def may_accumulate(lesson: Lesson) -> None:
    """A step in several passes has the gradients of one pass."""
    whole, parts = lesson.midway.gradients(), lesson.midway.gradients_in_parts()
    assert parts[0] == pytest.approx(whole[0], rel=SUMMED)
    _same_gradients(parts[1], whole[1], SUMMED)


def _same_gradients(found: Tensors, expected: Tensors, share: float) -> None:
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 0
    off = {name: float((found[name] - gradient).norm() / norm) for name, gradient in expected.items()}
    assert max(off.values()) <= share, f"{max(off, key=lambda name: off[name])} is off by {max(off.values())}"


def trains_in_half_precision(lesson: Lesson) -> None:
    """bf16: finite losses, and every weight keeps its dtype; what is trained has the base's."""
    half = lesson.half
    assert len(half.watch.losses) == 3
    assert all(map(isfinite, half.watch.losses))
    assert torch.isfinite(half.at_end).all()
    assert half.dtypes_after == half.dtypes
    assert {parameter.dtype for parameter in half.declared.values()} == {torch.bfloat16}


def goes_on_bit_for_bit(lesson: Lesson) -> None:
    """A run that was stopped and goes on in a new model ends with the bytes of one that was not."""
    last = f"checkpoints/step-{STEPS:08d}"
    whole, resumed = lesson.trained.folder / last, lesson.resumed.folder / last
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert names == sorted(path.name for path in resumed.glob("*.safetensors"))
    different = [name for name in names if (whole / name).read_bytes() != (resumed / name).read_bytes()]
    assert not different, f"{lesson}: {', '.join(different)} differ"
    assert torch.equal(logits(lesson.resumed.model), lesson.trained.at_end)


def takes_a_step_of(lesson: Lesson, objective: str) -> None:
    """A step ends with a finite loss, and something was learned."""
    trainer = lesson.trainer(f"objective-{objective}", objective=objective, max_steps=1, save_every=0)
    watch, before = Watch(trainer.optimizer.parameters), logits(trainer.model)
    trainer.log.readers.append(watch)
    trainer.run()
    assert len(watch.losses) == 1
    assert isfinite(watch.losses[0])
    assert not torch.equal(logits(trainer.model), before)


CHECKS: tuple[Check, ...] = (
    fits_what_it_says_it_fits,
    begins_as_the_base,
    changes_what_it_declares_and_nothing_else,
    gives_gradients_to_all_that_it_trains,
    counts_what_it_trains,
    merges_or_says_why_not,
    saves_what_it_trains_and_no_more,
    may_recompute_its_activations,
    may_accumulate,
    trains_in_half_precision,
    goes_on_bit_for_bit,
    comes_back_in_another_process,
)
