"""The main path on real models and real data, through the public API."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunewright as tw
from tunewright.data.rows import Message

QUESTION = "Give three tips for staying healthy."


def tinytalk(shared_fixtures, tmp_path, data: str, **options):
    return tw.run(
        {
            "model": str(shared_fixtures / "models/tinytalk-3m-chat"),
            "data": {
                "train": str(shared_fixtures / f"data/llamafactory-data/data/{data}.json"),
                "on_bad_row": "skip",
                "valid_share": 0.1,
                "max_length": 128,
            },
            "evaluate": {"limit": 8, "max_new_tokens": 16},
            "output": str(tmp_path / "run"),
            **options,
        },
        quiet=True,
    )


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_lora_on_english_alpaca(shared_fixtures, tmp_path):
    run = tinytalk(
        shared_fixtures, tmp_path, "alpaca_en_demo",
        method={"name": "lora", "rank": 8}, train={"max_steps": 30, "lr": 2e-3, "tokens_per_batch": 1024},
        precision="fp32",
    )  # fmt: skip
    stage = run.results["stages"][0]
    assert stage["after"]["loss"] < stage["before"]["loss"] - 0.5
    assert stage["data"]["padding_share"] < 0.05
    # PEFT itself loads what was saved, and says the same.
    folder = shared_fixtures / "models/tinytalk-3m-chat"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(run.artifact))
    ids = torch.tensor([run.speaker.codec.prompt((Message("user", QUESTION),))])
    assert torch.allclose(logits_of(theirs, ids), logits_of(run.speaker.model, ids), atol=1e-5, rtol=0)


def test_full_on_chinese_alpaca_is_a_plain_model_folder(shared_fixtures, tmp_path):
    run = tinytalk(
        shared_fixtures, tmp_path, "alpaca_zh_demo",
        method="full", train={"max_steps": 30, "lr": 1e-3, "tokens_per_batch": 1024}, precision="fp32",
    )  # fmt: skip
    stage = run.results["stages"][0]
    assert stage["after"]["loss"] < stage["before"]["loss"] - 0.5
    plain = AutoModelForCausalLM.from_pretrained(run.artifact, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.artifact)
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    assert torch.equal(logits_of(plain, ids), logits_of(run.speaker.model, ids))


def test_generation_stops_at_the_end_of_the_turn(shared_fixtures, tmp_path):
    """Trained on short answers, the model ends its turn by itself, long before the limit."""
    lines = [
        f'{{"prompt": "Say {w}.", "completion": "{w}"}}' for w in ("yes", "no", "cat", "dog", "sun", "tea")
    ]
    data = tmp_path / "short.jsonl"
    data.write_text("\n".join(lines))
    run = tw.run(
        {
            "model": str(shared_fixtures / "models/tinytalk-3m-chat"),
            "data": {"train": str(data), "valid_share": 0},
            "train": {"max_steps": 40, "lr": 5e-3, "tokens_per_batch": 256},
            "precision": "fp32",
            "output": str(tmp_path / "run"),
        },
        quiet=True,
    )
    speaker = run.speaker
    prompt = torch.tensor([speaker.codec.prompt((Message("user", "Say tea."),))])
    out = speaker.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False,
        eos_token_id=speaker.codec.stop_ids, pad_token_id=speaker.codec.pad_id,
    )  # fmt: skip
    said = out[0, prompt.shape[1] :].tolist()
    assert len(said) < 10
    assert said[-1] in speaker.codec.stop_ids
    assert run.generate("Say tea.") == "tea"
