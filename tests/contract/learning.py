"""What forty small steps on built-in data do to the loss of a method on the lower half of the built-in model."""

from pathlib import Path

from architectures import add_tokenizer
from lab import Lab

from tunewright.models.load import find, load_model
from tunewright.train.measure import HeldOut

BLOCKS, STEPS, HELD_OUT = 3, 40, 24
DATA = {"train": "builtin:demo-train", "valid": "builtin:demo-valid"}
TRAIN = {
    "max_steps": STEPS,
    "tokens_per_batch": 64,
    "micro_tokens": None,
    "lr": None,
    "save_every": 0,
    "eval_every": 0,
}


def save_lower_half(folder: Path) -> Path:
    """The built-in model without its upper blocks: half the time, and more left to learn."""
    model = load_model(find("builtin:pico"))
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def losses(method: str, model: Path, folder: Path) -> tuple[float, float]:
    """Mean loss over the same held-out rows before and after, at the method's own defaults."""
    trainer = Lab(folder, model).trainer(method, method={"name": method}, data=DATA, train=TRAIN)
    trainer.valid = [trainer.valid[i] for i in range(HELD_OUT)]
    measured = HeldOut(trainer.objective, trainer.valid, budget=1024)
    before = measured.loss(trainer.model)
    trainer.run()
    return before, measured.loss(trainer.model)
