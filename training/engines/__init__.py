"""The engines that train a plan: Composer's Trainer with DDP or FSDP, and DeepSpeed; and how ranks work together."""
