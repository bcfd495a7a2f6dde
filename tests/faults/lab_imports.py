"""What a run imports, so that the fork server has it already. No thread may have begun here."""

import peft
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunewright import cli, pipeline
from tunewright.evaluate import report

report.environment().get_template("report.html.jinja")  # compiled once, and not in every child

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "cli", "peft", "pipeline", "report", "transformers"]
