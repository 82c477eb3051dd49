"""Stage 1: imagine the next frames from an image and an instruction (video diffusion)."""
