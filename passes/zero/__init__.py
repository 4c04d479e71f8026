"""ZeRO: parameters and optimizer states are sharded among ranks."""
