"""ZeRO: shard parameters, gradients and optimizer state across ranks."""
