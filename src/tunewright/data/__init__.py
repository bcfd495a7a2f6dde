"""From files to token batches: read, lint, template, tokenize once, batch by length."""
