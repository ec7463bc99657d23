"""What reinforcement learning is made of: answers, rewards, advantages, losses."""
