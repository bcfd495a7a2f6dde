"""(IA)³: keys, values and the feed-forward's inner activations are scaled by trained vectors (Liu et al. 2022)."""

from typing import Any

from tunewright.core.config import Config as BaseConfig
from tunewright.core.words import Words
from tunewright.methods import Facts
from tunewright.methods._peft import PeftMethod
from tunewright.models import anatomy

_SCALED_OUT = ("k_proj", "v_proj", "key", "value", "c_attn", "query_key_value", "qkv_proj")


class Config(BaseConfig):
    """Which layers are scaled is the method's own matter: keys, values, and the way out of the feed-forward."""


class Ia3(PeftMethod):
    """Trains one number for each key, value and inner activation of the feed-forward."""

    default_lr = 1e-2
    saves = "IA3"
    reads = ("IA3",)
    facts = Facts(
        idea=Words(
            "Nothing is added: keys, values and inner activations are only made louder or softer.",
            "不加任何新层：只把键、值和前馈内部激活放大或缩小。",
        ),
        formula="k' = l_k ⊙ k, v' = l_v ⊙ v, FFN(x) = W₂·(l_ff ⊙ f(W₁·x))",
        count="Σ out over key and value layers + Σ in over the feed-forward's last layers",
        inference=Words("none once merged", "合并后无额外开销"),
        when=Words(
            "Very little data and very small adapters: ten thousand times fewer numbers than the model.",
            "数据极少、适配器要极小：参数量约为模型的万分之一。",
        ),
        paper="Liu et al. 2022, arXiv:2205.05638",
    )

    def adapted(self, model: Any) -> list[anatomy.Linear]:
        """Key and value layers, and the last layer of each feed-forward."""
        last = {layer.name for layer in _ways_out(model)}
        return [n for n in anatomy.linears(model) if n.name.endswith(_SCALED_OUT) or n.name in last]

    def peft_config(self, model: Any) -> Any:
        """PEFT's IA3Config, layers named in full."""
        from peft import IA3Config

        return IA3Config(
            target_modules=[layer.name for layer in self.adapted(model)],
            feedforward_modules=[layer.name for layer in _ways_out(model)], task_type="CAUSAL_LM",
            fan_in_fan_out=self.stored_transposed(model),
        )  # fmt: skip

    def count(self, model: Any) -> int:
        """A vector for each layer: over the outputs of keys and values, over the inputs of the feed-forward's end."""
        last = {layer.name for layer in _ways_out(model)}
        return sum(n.inputs if n.name in last else n.outputs for n in self.adapted(model))


def _ways_out(model: Any) -> list[anatomy.Linear]:
    """The last linear layer of each block's feed-forward; a mixture's fused experts have none."""
    names = {module: name for name, module in model.named_modules()}
    last: set[str] = set()
    for _, block in anatomy.blocks(model):
        inner = anatomy.feed_forward(block)
        found = anatomy.linears(inner) if inner is not None else []
        last.update(f"{names[inner]}.{layer.name}" for layer in found[-1:])
    return [layer for layer in anatomy.linears(model) if layer.name in last]
