"""How far a model has moved, by answers of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunewright as tw
from tunewright.core.rng import derive
from tunewright.data.rows import Message, Row
from tunewright.data.template import ChatCodec
from tunewright.evaluate.harness import Examination
from tunewright.models.generate import Draw, draw
from tunewright.recipes import EvaluateConfig


def examination(tokenizer: Any, count: int, longest: int) -> Examination:
    rows = [Row(f"r:{n}", (Message("user", "Say hello."), Message("assistant", "Hi."))) for n in range(count)]
    config = EvaluateConfig(max_new_tokens=longest)
    return Examination(None, ChatCodec(tokenizer), [], rows, config)  # type: ignore[arg-type]


def test_of_one_token_it_is_the_divergence_of_two_distributions(make_model: Any, tokenizer: Any) -> None:
    before, after = make_model().eval(), make_model().eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    exam = examination(tokenizer, 3000, 1)
    ids = torch.tensor([exam.codec.prompt(exam.rows[0].messages[:-1])])
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (after, before))
    exact, spread = (p.exp() * (p - q)).sum(), (p.exp() * (p - q).square()).sum().sqrt()
    found = exam.kl(after, before)
    assert abs(found - exact.item()) < 4 * spread.item() / 3000**0.5
    assert exact > 0.05
    assert exam.kl(after, after) == 0
    assert found == exam.kl(after, before)


def test_all_tokens_of_an_answer_count(make_model: Any, tokenizer: Any) -> None:
    before, exam = make_model().eval(), examination(tokenizer, 5, 6)
    after = make_model().eval()
    after.lm_head.weight = torch.nn.Parameter(after.lm_head.weight * 1.5)
    found = exam.kl(after, before)
    torch.manual_seed(derive(0, "divergence"))
    prompt = exam.codec.prompt(exam.rows[0].messages[:-1])
    total = 0.0
    for said in draw(after, exam.codec, [prompt] * 5, Draw(1, 6), 64):
        ids = torch.tensor([prompt + said])
        with torch.no_grad():
            logs = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (after, before)]
        at = torch.arange(len(said)), torch.tensor(said)
        total += (logs[0][at] - logs[1][at]).sum().item()
    assert found == pytest.approx(total / 5, rel=1e-4)


def test_a_run_tells_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    run = tw.run({
        "model": str(tiny_model_folder), "data": "builtin:polite-valid", "objective": "dpo", "precision": "fp32",
        "train": {"max_steps": 3, "lr": 1e-2, "tokens_per_batch": 512}, "output": str(tmp_path / "run"),
        "evaluate": {"kl": True, "max_new_tokens": 5, "limit": 8},
    }, quiet=True)  # fmt: skip
    assert run.results["stages"][0]["after"]["kl"] > 0
    assert "from those of the model before (KL)" in run.report.read_text()
