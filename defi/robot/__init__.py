"""What a robot is to a policy. Nothing here needs PyTorch."""
