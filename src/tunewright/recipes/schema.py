"""What a recipe may say. The options of methods and objectives live in their own files."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from tunewright.core.config import Config


class DataFile(Config):
    """One data file or folder, with what cannot be detected."""

    path: str
    """A file, a folder, ``builtin:NAME``, or ``FOLDER:NAME`` for a dataset_info.json entry."""
    format: str = "auto"
    """alpaca, sharegpt, messages, prompt-completion, text, plain; auto detects it."""
    weight: float = Field(1.0, gt=0)
    """How often its rows come up in an epoch: 2 is twice, 0.5 is every second row."""
    task: str = Field("", max_length=64, pattern=r"^[A-Za-z0-9_-]*$")
    """What its rows are for; method multi_task trains an adapter for each task."""
    columns: dict[str, str] = {}
    """Our name of a column -> the file's name of it."""
    tags: dict[str, str] = {}
    """ShareGPT tags, as in dataset_info.json."""


def _as_files(value: Any) -> Any:
    """``train: a.jsonl`` and ``train: [a.jsonl, {path: b.jsonl, weight: 2}]`` mean the same kind of list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


DataFiles = Annotated[
    tuple[DataFile, ...],
    BeforeValidator(_as_files, json_schema_input_type=str | DataFile | list[str | DataFile]),
]


class DataConfig(Config):
    """Which rows are learned and which are held out."""

    train: DataFiles
    """One file, or a list of files with weights."""
    valid: DataFiles = ()
    """Held-out rows. Without them ``valid_share`` of the training rows is held out."""
    valid_share: float = Field(0.05, ge=0, lt=1)
    """Share of training samples held out when ``valid`` is not given; 0 turns evaluation off."""
    template: str = "auto"
    """auto is the tokenizer's own chat template; or alpaca, chatml, llama2, llama3, plain, vicuna."""
    max_length: int = Field(1024, ge=8)
    """Longest sample in tokens; what is longer is cut at the end."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop refuses to train on a file with bad rows; skip leaves them out and lists them."""


class TrainConfig(Config):
    """How long, how fast, in what portions."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the data; unused when max_steps is given."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; without it, the method's own default."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate over time; wsd is warm-up, plateau, decay."""
    warmup: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the rate rises from 0."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps over which wsd falls to 0."""
    tokens_per_batch: int = Field(4096, ge=8)
    """Tokens (padding included) in one optimizer step."""
    micro_tokens: int | None = Field(None, ge=8)
    """Tokens in one forward pass, held-out ones as well; smaller than tokens_per_batch accumulates gradients."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every: int = Field(0, ge=0)
    """Steps between held-out losses; 0 is only at the end."""
    early_stop: int = Field(0, ge=0)
    """Evaluations without improvement after which training ends; 0 is never."""
    restore_best: bool = True
    """End with the weights of the lowest held-out loss, where eval_every measured several."""
    save_every: int = Field(200, ge=0)
    """Steps between checkpoints; 0 is only at the end."""
    on_spike: Literal["skip", "learn"] = "skip"
    """skip passes over a batch whose loss stands far out from those before it; learn takes it as it is."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept (the best is kept besides)."""
    seed: int = Field(0, ge=0)
    """Seed of sample order, initialisation and dropout."""

    @property
    def held_out_tokens(self) -> int:
        """Of what is held out, so many tokens in one forward pass: no more than of what is learned."""
        return min(self.micro_tokens or self.tokens_per_batch, self.tokens_per_batch)


class EvaluateConfig(Config):
    """What is measured before and after training."""

    enabled: bool = True
    """Measure held-out loss (and answers) before and after."""
    generate: bool = True
    """For conversations: generate answers, score exact match, show samples side by side."""
    limit: int = Field(400, ge=1)
    """At most so many held-out rows are answered."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest generated answer in tokens."""
    old: dict[str, DataFiles] = {}
    """What the model knew before, by name: its loss on these files before and after tells what was forgotten."""
    rewards: tuple[str, ...] = ()
    """What answers are worth before and after, as in ``grpo``: exact_match, contains, brevity, or FILE.py:FUNCTION."""
    kl: bool = False
    """Tell how far the model has moved: the mean of log(after / before) of its own answers, one drawn for each row asked.
    It takes the memory of a second model."""
    samples: int = Field(12, ge=0)
    """Answers shown side by side in the report."""


class Advised(Config):
    """What the advisor says of a stage that it chose, so that the report can tell how well it was foretold."""

    method: str
    """Of which it says this; with another one it is left out."""
    why: tuple[str, ...] = ()
    """In plain words."""
    memory: float = Field(ge=0)
    """Bytes of the process, at its peak."""
    tokens_per_second: float = Field(gt=0)
    """Of training."""
    seconds: float = Field(ge=0)
    """Of training."""
    tried: int = Field(0, ge=0)
    """Real steps that the figures come from; 0 where they were computed."""
    question: str = ""
    """SHA-256 of the stage as it was written, with ``method: auto``: while it is the same, the answer is."""


EARLIER = "stage:"
"""Before the name of a stage, where a model is asked for: its result."""
AUTO = "auto"
"""The method that asks the advisor for one."""


class Auto(Config):
    """Options of ``method: auto``: method and dials that the recipe leaves open are chosen when the run begins."""

    goal: Literal["", "quality", "speed", "memory", "multi-task", "alignment"] = ""
    """What counts most."""
    memory: str = ""
    """What the run may take, such as 4GB; all that is free if not given."""
    deadline: str = ""
    """How long training may take, such as 2h."""
    tries: int = Field(3, ge=0, le=20)
    """Plans that are tried for a few real steps; 0 only computes."""
    rates: bool = True
    """Find the learning rate by a short range test, if plans are tried and the recipe gives none."""


CHOSEN = {"method": "lora", "objective": "sft", "optimizer": "adamw"}
"""What a stage has that names none; each key's plugins are in the room of its plural."""


def as_choice(value: Any, key: str) -> Any:
    """``method: full`` is short for ``method: {name: full}``; a mapping without a name is the default's."""
    if isinstance(value, dict):
        return {"name": CHOSEN[key], **value}
    return {"name": value} if isinstance(value, str) else value


Method = Annotated[dict[str, Any], BeforeValidator(lambda value: as_choice(value, "method"))]
Objective = Annotated[dict[str, Any], BeforeValidator(lambda value: as_choice(value, "objective"))]
Optimizer = Annotated[dict[str, Any], BeforeValidator(lambda value: as_choice(value, "optimizer"))]


def as_list(value: Any) -> Any:
    """``regularizers: l2sp`` and ``regularizers: [l2sp, {name: ewc, ...}]`` mean the same kind of list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"name": item} if isinstance(item, str) else item for item in items)


Regularizers = Annotated[
    tuple[dict[str, Any], ...],
    BeforeValidator(as_list, json_schema_input_type=str | dict[str, Any] | list[str | dict[str, Any]]),
]


def as_data(value: Any) -> Any:
    """``data: my.jsonl`` is short for ``data: {train: my.jsonl}``."""
    return {"train": value} if isinstance(value, (str, list)) else value


Data = Annotated[DataConfig, BeforeValidator(as_data, json_schema_input_type=str | list[str] | DataConfig)]


class Stage(Config):
    """One training stage: a model, data, and the choice of method, objective and precision."""

    name: str = Field("", max_length=64, pattern=r"^[A-Za-z0-9_-]*$")
    """Name of the stage's folder; the objective's name if not given."""
    model: str
    """builtin:pico, a Hugging Face folder, a hub id, or stage:NAME for an earlier stage's result."""
    data: Data
    """What to learn from."""
    method: Method = {"name": CHOSEN["method"]}
    """What is trained; ``name`` and that method's own options."""
    objective: Objective = {"name": CHOSEN["objective"]}
    """What is minimised; ``name`` and that objective's own options."""
    regularizers: Regularizers = ()
    """What holds the model to what it knew: each a name, or ``name`` and its own options."""
    optimizer: Optimizer = {"name": CHOSEN["optimizer"]}
    """How weights move along their gradients; ``name`` and that optimizer's own options."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 holds weights in bf16 with fp32 masters of what is trained; fp16 needs a GPU."""
    fast: bool | dict[str, bool] = True
    """Speed techniques: all on or off, or some of them by name; ``tunewright list fast`` tells them."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    train: TrainConfig = TrainConfig()
    """The training dials."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """The measurements."""
    advised: Advised | None = None
    """Written by ``tunewright advise`` and ``method: auto``; it changes nothing."""

    @field_validator("regularizers")
    @classmethod
    def _have_names(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for item in value:
            cls._has_name(item)
        return value

    @field_validator(*CHOSEN)
    @classmethod
    def _has_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("name"), str):
            raise ValueError("needs a `name`")  # noqa: TRY004 pydantic wants a ValueError
        return value


class Eval(Config):
    """What ends a run of stages: the same held-out rows put to several models, side by side."""

    models: tuple[str, ...] = ()
    """``stage:NAME``, a folder, a built-in name or a hub id, each; the others are compared with the first. Without any,
    the first stage's model and every stage that answers."""
    data: DataFiles = ()
    """Held-out files; without any, ``data.valid`` of the whole file."""
    template: str = "auto"
    """Chat template of models that have none."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """How the models' weights are held."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured; what the file says for all stages holds here, too. ``old`` and ``kl`` are each stage's own."""


class Recipe(Config):
    """A run: where it goes, what reads its events, and its stages in order."""

    output: str
    """The run folder."""
    logs: tuple[Literal["tensorboard"], ...] = ()
    """Extra readers of the event stream."""
    stages: tuple[Stage, ...]
    """Each complete in itself: what the file says for all stages is already merged in."""
    eval: Eval | None = None
    """What is measured last; ``true`` is all stages on ``data.valid``."""
