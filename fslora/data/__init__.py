"""Text for federated training: reading rows, dealing them to clients, tokenising, scoring.

rows → partition → tasks (causal_lm, classification, instruction) → federated, which joins them.
Nothing is imported here, so that `fslora --help` does not wait for torch.
"""
