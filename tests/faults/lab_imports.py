"""What a run imports and compiles, so that the fork server has it already. No thread may have begun here."""

import gc

import peft
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tunewright import cli, pipeline
from tunewright.core import plugins
from tunewright.evaluate import report

for room in plugins.ROOMS:
    for name in plugins.names(room):
        plugins.load(room, name)
report.environment().get_template("report.html.jinja")
get_checkpoint_conversion_mapping("llama")  # a thousand patterns
gc.collect()
gc.freeze()  # else each child copies the pages of all this when it looks for garbage

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "cli", "peft", "pipeline", "report", "transformers"]
