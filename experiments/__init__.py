"""The paper's claims as comparisons: arms, trained alike but for one thing, rolled out on the same chains."""
