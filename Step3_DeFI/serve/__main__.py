"""`python -m Step3_DeFI.serve`: see command.py."""

from Step3_DeFI.serve.command import main

if __name__ == "__main__":
    main()
