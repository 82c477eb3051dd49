"""Stage 2: name the motion between two frames with a few discrete latent actions, from video alone."""
