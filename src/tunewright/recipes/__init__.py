"""The recipe: one schema, validated whole before anything runs."""

from tunewright.recipes.load import EVAL, load, plugin_config, schema_json, stage_trees, to_yaml
from tunewright.recipes.schema import (
    AUTO,
    EARLIER,
    Advised,
    Auto,
    DataConfig,
    Eval,
    EvaluateConfig,
    Recipe,
    Stage,
    TrainConfig,
)

__all__ = [
    "AUTO", "EARLIER", "EVAL", "Advised", "Auto", "DataConfig", "Eval", "EvaluateConfig", "Recipe", "Stage", "TrainConfig",
    "load", "plugin_config", "schema_json", "stage_trees", "to_yaml",
]  # fmt: skip
