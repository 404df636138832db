"""Run lm-eval's own Python interface on a pruned model, with a task over a local file.

python scripts/examples/harness.py pruned tasks
"""

from __future__ import annotations

import argparse

import lm_eval

from llmprune.eval.harness import manager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("task_data", help="folder with piqa_valid.jsonl")
    parser.add_argument("--limit", type=int, default=100)
    arguments = parser.parse_args()

    found = lm_eval.simple_evaluate(
        model="llmprune",  # registered by the import above
        model_args={"pretrained": arguments.model, "dtype": "float32"},
        tasks=["local_piqa"],
        task_manager=manager(["local_piqa"], arguments.task_data),
        limit=arguments.limit,
        batch_size=8,
    )
    print(found["results"]["local_piqa"])


if __name__ == "__main__":
    main()
