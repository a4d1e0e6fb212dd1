"""Pre-training (report section 4): schedules, losses, load balance, the trainer and its checkpoints."""
