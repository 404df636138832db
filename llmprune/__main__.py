"""The command as a program: it can be interrupted from its first moment on, while libraries are still being loaded."""

import sys

from llmprune import interruption


def main() -> None:
    interruption.listen()
    try:
        from llmprune.cli import main as command_line
    except interruption.Interrupted:
        sys.exit("error: interrupted")
    command_line()


if __name__ == "__main__":
    main()
