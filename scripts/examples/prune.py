"""Prune a model from Python, measure it beside the dense one, and write a report page.

python scripts/examples/prune.py path/to/model pruned --text file:text.txt --held-out file:other-text.txt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import llmprune
from llmprune.report.page import read_run, write_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="demo")
    parser.add_argument("--held-out", default="demo")
    parser.add_argument("--seqlen", type=int, default=2048)
    arguments = parser.parse_args()

    result = llmprune.prune(
        arguments.model,
        method="sparsegpt",
        pattern="2:4",
        calibration=arguments.text,
        seqlen=arguments.seqlen,
        out=arguments.out,
    )
    print(f"{result.report['totals']['zeros']:,} parameters are zero now")

    measured = llmprune.evaluate(
        arguments.out,
        baseline=arguments.model,
        perplexity=arguments.held_out,
        seqlen=arguments.seqlen,
        prompts=["Once upon a time"],
    )
    close = measured["comparison"]["perplexity"][arguments.held_out]
    print(f"perplexity × {close['ratio']:.3f}, same top token {close['top1']:.1%}")

    # the report and the model card read the measurement from beside the recipe
    report = arguments.out / "llmprune.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "evaluation": measured}, indent=1))
    page = arguments.out / "report.html"
    write_page(page, [read_run(arguments.out)])
    print(page)


if __name__ == "__main__":
    main()
