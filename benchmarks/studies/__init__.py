"""Studies of what the methods are worth in training: `docs/gkd-ablation.md` tells their results."""
