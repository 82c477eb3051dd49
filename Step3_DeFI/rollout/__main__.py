"""`python -m Step3_DeFI.rollout`: see evaluate.py."""

from Step3_DeFI.rollout.evaluate import main

if __name__ == "__main__":
    main()
