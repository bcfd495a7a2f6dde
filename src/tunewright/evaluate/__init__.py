"""What a model is worth: held-out loss, answers, scores per family, and the report."""
