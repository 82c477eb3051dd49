"""Stage 3: a policy that acts on the imagined future and its latent actions."""
