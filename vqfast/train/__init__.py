"""Training: `tokenizer.run` for stage 1, `transformer.run` for stage 2; both are what `vqfast
train` calls.
"""
