"""The main job on a small real model and text that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch

PROMPT = "Once upon a time, there was a little girl named Lily. She"
METHOD, SPARSITY = "sparsegpt", 0.3


def run(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Prune the embedded model, measure it before and after, let both write a sentence, write a report.

    `out` receives `model/` and `report.html`; what an earlier demo left there is replaced.
    """
    from llmprune import api
    from llmprune.progress import Reporter
    from llmprune.report.page import write_page

    with resources.as_file(resources.files("llmprune.demo").joinpath("model")) as dense:
        result = api.prune(
            dense,
            out=out / "model",
            method=METHOD,
            sparsity=SPARSITY,
            calibration="demo",
            samples=64,
            seqlen=256,
            overwrite=True,
            reporter=Reporter(quiet=quiet),
        )
        rows = [_measure(name, folder) for name, folder in (("dense", dense), ("pruned", out / "model"))]
    for row in rows:
        print(f"\n{row['name']}: perplexity {row['perplexity']:.3f}\n  {row['text']}")
    page = out / "report.html"
    write_page(page, [{"name": "demo", **result.report, "evaluation": _as_evaluation(*rows)}], figures=False)
    print(f"\nthe pruned model lies in {out / 'model'}, the report in {page}")
    return {"report": result.report, "rows": rows}


def _as_evaluation(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """The two rows in the form that `llmprune.evaluate` gives."""
    one, other = (
        {
            "model": row["name"],
            "perplexity": {"demo": row["protocol"]},
            "generation": [{"prompt": PROMPT, "text": row["text"]}],
        }
        for row in (pruned, dense)
    )
    return {**one, "baseline": other}


def _measure(name: str, folder: Path) -> dict[str, Any]:
    from llmprune.eval.perplexity import measure, open_model

    model, tokenizer = open_model(folder)
    scores = measure(model, tokenizer, "demo", seqlen=256)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**ids, max_new_tokens=40, do_sample=False)
    return {
        "name": name,
        "perplexity": scores["ppl"],
        "protocol": scores,
        "text": tokenizer.decode(written[0], skip_special_tokens=True),
    }
