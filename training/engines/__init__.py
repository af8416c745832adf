"""What trains a plan: Composer's Trainer with DDP or FSDP, DeepSpeed, and what ranks need of each other."""
