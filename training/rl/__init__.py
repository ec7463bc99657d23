"""Parts of reinforcement learning: policy, rollouts, rewards, objective."""
