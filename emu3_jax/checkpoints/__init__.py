"""Model bundles, and the way between them and the published PyTorch checkpoints."""
