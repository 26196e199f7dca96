"""``python -m trainer``: the `egmf` command, and what the deepspeed launcher starts."""

from trainer.cli import main

if __name__ == "__main__":
    main()
