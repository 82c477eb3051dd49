"""What the three stages share: training engine, checkpoints, text towers, video, simulation."""

__version__ = "0.1.0"
