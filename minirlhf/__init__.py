"""minirlhf: reinforcement learning from human feedback, from scratch, in PyTorch."""
