"""Learning rate as a function of the step."""

from math import cos, pi

from tunewright.recipes import TrainConfig


def rate(config: TrainConfig, step: int, steps: int) -> float:
    """The factor on the peak rate at 0-based ``step`` of ``steps``: in [0, 1].

    ``linear`` and ``cosine`` fall to 0 after the warm-up; ``wsd`` stays at 1 and falls linearly over the
    last ``decay`` share (Hu et al. 2024, MiniCPM).
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        falling = max(1, round(config.decay * steps))
        return min(1.0, (steps - step) / falling)
    progress = (step - warm) / max(1, steps - warm)
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + cos(pi * progress))
