"""Checkpoints: DeepSpeed shards to plain models, released deltas to models, adapters into their base, and back."""
