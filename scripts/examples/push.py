"""Show what a push to the Hub would send, and send it with --really.

python scripts/examples/push.py pruned you/model-2of4 --base-model org/model
"""

from __future__ import annotations

import argparse

from llmprune.hub import push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("repo")
    parser.add_argument("--base-model")
    parser.add_argument("--really", action="store_true")
    arguments = parser.parse_args()

    done = push(arguments.folder, arguments.repo, base_model=arguments.base_model, dry_run=not arguments.really)
    for file in done["files"]:
        print(f"{file['bytes']:>14,}  {file['name']}")
    print(done["url"] if arguments.really else done["card"])


if __name__ == "__main__":
    main()
