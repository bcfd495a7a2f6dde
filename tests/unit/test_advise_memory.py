"""Memory and speed by the formulas that they were published as."""

import pytest

from tunewright.advise import configs, hardware, memory, speed
from tunewright.advise.memory import Choice, Parts, estimate
from tunewright.advise.placement import Placement, fits, simplest
from tunewright.advise.shape import Linear, Shape

LLAMA = configs.named("llama-2-7b")
GB = 1e9


def gpt(hidden: int, layers: int, heads: int, vocabulary: int = 51200) -> Shape:
    """GPT as its papers count it: twelve squares of the hidden size in a block."""
    wide = 4 * hidden
    linears = (
        Linear("attention.qkv", hidden, 3 * hidden, layers, True), Linear("attention.out", hidden, hidden, layers, True),
        Linear("mlp.up", hidden, wide, layers, True), Linear("mlp.down", wide, hidden, layers, True),
    )  # fmt: skip
    size = hidden // heads
    return Shape("gpt", "gpt2", hidden, layers, heads, heads, size, wide, vocabulary, 2048, True, linears,
                 positions=2048, gated=False, layer_norm=True, packed=True)  # fmt: skip


def test_a_trained_parameter_takes_sixteen_bytes() -> None:
    parts = estimate(LLAMA, Choice("full"))
    assert parts.weights + parts.gradients + parts.optimizer == 16 * LLAMA.parameters


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_so_it_does_where_the_weight_is_its_own_master(precision: str) -> None:
    parts = estimate(LLAMA, Choice("full", precision=precision))
    assert parts.weights + parts.gradients + parts.optimizer == 16 * LLAMA.parameters


def test_a_frozen_one_takes_two_and_quantized_about_half() -> None:
    lora, qlora = estimate(LLAMA, Choice("lora")), estimate(LLAMA, Choice("qlora"))
    assert lora.weights == 2 * (LLAMA.parameters + 39_976_960)
    assert 0.5 < (qlora.weights - 2 * 39_976_960) / LLAMA.parameters < 0.65
    assert lora.gradients == qlora.gradients == 2 * 39_976_960


def test_zero_divides_as_its_paper_says() -> None:
    model = Parts(weights=2 * 7.5 * GB, gradients=2 * 7.5 * GB, optimizer=12 * 7.5 * GB)
    found = [Placement(64, zero).divide(model, LLAMA, Choice("full")) for zero in (0, 2)]
    assert [round(parts.total / GB, 1) for parts in found] == [120.0, 16.6]  # arXiv:1910.02054, figure 1
    third = Placement(64, 3).divide(model, LLAMA, Choice("full"))
    gathered = 2 * memory.layer_bytes(LLAMA, Choice("full"))
    assert round((third.total - gathered) / GB, 1) == 1.9


@pytest.mark.parametrize(("flash", "factor"), [(False, 34 + 5 * 96 * 2048 / 12288), (True, 34)])
def test_activations_of_gpt_are_those_of_korthikanti(flash: bool, factor: float) -> None:
    shape = gpt(12288, 96, 96)
    choice = Choice("full", micro_tokens=2048, length=2048, flash=flash, dropout=True)
    assert memory.activations(shape, choice) == 96 * 2048 * 12288 * factor


def test_checkpointing_keeps_inputs_of_blocks_and_one_block() -> None:
    choice = Choice("full", micro_tokens=2048, checkpointing=True)
    kept = LLAMA.layers * 2048 * 2 * LLAMA.hidden
    assert memory.activations(LLAMA, choice) == kept + 2048 * memory.block_bytes(LLAMA, choice)


def test_of_half_the_blocks_half_the_activations() -> None:
    assert 2 * memory.activations(LLAMA, Choice("partial")) == memory.activations(LLAMA, Choice("full"))


def test_biases_ask_for_fewer_activations_than_matrices() -> None:
    assert memory.activations(LLAMA, Choice("bitfit")) < memory.activations(LLAMA, Choice("lora"))
    assert memory.activations(LLAMA, Choice("lora")) < memory.activations(LLAMA, Choice("dora"))


def test_a_token_of_a_mixture_keeps_what_two_experts_keep() -> None:
    mixture, dense = configs.named("mixtral-8x7b"), configs.named("mistral-7b")
    assert dense.inner == mixture.inner
    more = memory.block_bytes(mixture, Choice("full")) - memory.block_bytes(dense, Choice("full"))
    assert more == 2 * 4 * dense.inner


def test_logits_exist_some_rows_at_a_time() -> None:
    assert memory.logits(LLAMA, Choice("full")) == 64 << 20
    assert memory.logits(LLAMA, Choice("full", micro_tokens=1000, chunked=False)) == 1000 * 32000 * 10


@pytest.mark.parametrize(
    ("method", "objective", "expected"),
    [("full", "dpo", 0), ("full", "ppo", 2 * LLAMA.parameters), ("lora", "ppo", 0), ("full", "grpo", 0)],
)
def test_a_second_model_is_held_where_one_is_asked_for(method: str, objective: str, expected: int) -> None:
    answers = 8 * 1024 * 2 * LLAMA.keys_and_values if objective != "dpo" else 0
    assert estimate(LLAMA, Choice(method, objective)).cache == expected + answers


def test_measuring_counts_where_training_takes_less() -> None:
    assert estimate(LLAMA, Choice("full")).evaluation == 0
    gpt2 = configs.named("gpt2")
    checkpointed = Choice("prompt", micro_tokens=1024, checkpointing=True)
    assert estimate(gpt2, checkpointed).evaluation > 0


def test_tensor_parallelism_divides_weights_and_activations() -> None:
    whole = estimate(LLAMA, Choice("full"))
    part = Placement(8, tensor=8).divide(whole, LLAMA, Choice("full"))
    assert part.total == pytest.approx(whole.total / 8)
    piped = Placement(16, tensor=8, pipeline=2).divide(whole, LLAMA, Choice("full"))
    assert (piped.weights, piped.activations) == (whole.weights / 16, whole.activations / 8)


def test_what_is_offloaded_is_not_on_the_device() -> None:
    parts = Placement(offload=True).divide(estimate(LLAMA, Choice("full")), LLAMA, Choice("full"))
    assert parts.optimizer == 0
    assert parts.gradients > 0


def test_a_tenth_stays_free() -> None:
    assert fits(Parts(weights=90), 100)
    assert not fits(Parts(weights=91), 100)


@pytest.mark.parametrize(
    ("fleet", "names"),
    [("1xH100", ["single", "single + offload"]),
     ("2xH100", ["ddp", "zero2", "zero3", "tensor 2", "zero3 + offload"]),
     ("16xH100", ["ddp", "zero2", "zero3", "tensor 8 + zero2 x 2", "tensor 8 x pipeline 2", "zero3 + offload"])],
)  # fmt: skip
def test_placements_come_simplest_first(fleet: str, names: list[str]) -> None:
    assert [place.name for place in simplest(LLAMA, hardware.parse(fleet))] == names


def test_operations_are_six_for_each_weight_and_four_for_a_frozen_one() -> None:
    weights, attention = LLAMA.multiplied, 12 * LLAMA.layers * LLAMA.hidden * 1024
    assert speed.operations(LLAMA, Choice("full")) == 6 * weights + attention
    lora = 4 * weights + attention + 6 * 39_976_960
    assert speed.operations(LLAMA, Choice("lora")) == lora
    again = 2 * weights + attention / 3
    assert speed.operations(LLAMA, Choice("lora", checkpointing=True)) == pytest.approx(lora + again)


def test_a_slow_link_makes_devices_wait() -> None:
    choice = Choice("full", micro_tokens=512)
    near = speed.pace(LLAMA, choice, Placement(8, 3), hardware.parse("8xH100"), 8 * 512)
    far = speed.pace(LLAMA, choice, Placement(64, 3), hardware.parse("64xH100"), 64 * 512)
    assert near.waiting < 0.5 < 0.9 < far.waiting
    assert far.tokens_per_second < 64 / 8 * near.tokens_per_second


def test_drawing_answers_takes_time() -> None:
    fleet = hardware.parse("1xH100")
    learned = speed.pace(LLAMA, Choice("lora"), Placement(), fleet, 4096)
    drawn = speed.pace(LLAMA, Choice("lora", "grpo"), Placement(), fleet, 4096)
    assert drawn.tokens_per_second < learned.tokens_per_second / 2
