"""Putting a pruned model on the Hub, with a model card that keeps what people wrote into it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from jinja2 import Environment, PackageLoader

from llmprune.checkpoint.source import Checkpoint
from llmprune.report import words
from llmprune.types import RunError, UserError

BEGIN, END = "<!-- llmprune: begin, rewritten at every push -->", "<!-- llmprune: end -->"
# Marks the results that a push may replace; those of other sources stay.
SOURCE = "llmprune"
LEFT_OUT = ("lock", "*.writing", "journal.jsonl", ".*", "__pycache__/*")
CARD = "README.md"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload a finished run with its model card and report; returns what was (or would be) uploaded.

    The repository is created if it is not there (`private` then decides). `revision`: a branch, created if
    needed; `create_pr` opens a pull request instead. `base_model`: Hub id of the dense model, if the recipe
    names a folder; its licence is inherited unless `license` is given. `token`: only if the one that
    huggingface_hub finds is not to be used. A broken upload goes on where it was when repeated.

    Raises UserError for a folder that is no finished run and for a refused login, RunError if the Hub fails.
    """
    path = Path(folder)
    report = finished_run(path)
    if create_pr and revision is not None:
        raise UserError(
            f"a pull request goes to the main branch: leave out the revision {revision!r}, or the pull request"
        )
    api = HfApi(token=token)
    with _failures_understood(repo_id):
        card = model_card(path, report, repo_id, api=api, base_model=base_model, license=license, revision=revision)
        files = [{"name": name, "bytes": (path / name).stat().st_size} for name in uploaded(path)]
        files.append({"name": CARD, "bytes": len(str(card).encode())})
        planned = {"repo_id": repo_id, "private": private, "revision": revision, "pull_request": create_pr}
        shown = {**planned, "files": files, "card": str(card)}
        if dry_run:
            return shown
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            revision=revision,
            create_pr=create_pr,
            commit_message=f"Pruned by llmprune: {words.methods(report)}",
            ignore_patterns=[*LEFT_OUT, CARD],
        )
        # not by way of the folder: a card left there would win over later edits on the Hub
        api.upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo=CARD,
            repo_id=repo_id,
            revision=done.pr_revision if create_pr else revision,
            commit_message="Model card",
        )
    return {**shown, "url": str(url), "commit": done.oid, "pull_request_url": done.pr_url}


@contextlib.contextmanager
def _failures_understood(repo_id: str) -> Iterator[None]:
    """Turn what the client and its transport raise into our errors."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise _understood(repo_id, error) from error
    except Exception as error:
        # the transport (httpx, or its successor) has exceptions of its own, which are no OSError
        if not isinstance(error, OSError | RuntimeError) and not type(error).__module__.startswith("httpx"):
            raise
        again = "Repeat the command: what is there is kept"
        raise RunError(f"the upload to {repo_id} broke off: {error}. {again}") from error


def finished_run(folder: Path) -> dict[str, Any]:
    """The report of a folder that holds a finished run; raises UserError for anything else."""
    if folder.name.endswith(".partial") or (folder / "journal.jsonl").exists():
        raise UserError(f"{folder} holds an unfinished run; finish it with --resume before it is pushed")
    try:
        report: dict[str, Any] = json.loads((folder / "llmprune.json").read_text())
        complete = all(key in report for key in ("recipe", "totals", "tensors", "versions"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} is no finished run of llmprune: it has no readable llmprune.json ({error})"
        ) from error
    if not complete or not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no finished run of llmprune: its llmprune.json or config.json is incomplete")
    Checkpoint(folder)  # every weight file is there and readable
    return report


def uploaded(folder: Path) -> list[str]:
    """The files that a push sends beside the card, by their path in the folder."""
    files = (one.relative_to(folder).as_posix() for one in sorted(folder.rglob("*")) if one.is_file())
    return [name for name in files if not any(fnmatch(name, pattern) for pattern in (*LEFT_OUT, CARD))]


def model_card(
    folder: Path,
    report: dict[str, Any],
    repo_id: str,
    *,
    api: HfApi | None = None,
    base_model: str | None = None,
    license: str | None = None,
    revision: str | None = None,
) -> ModelCard:
    """The card of a run: new, or that in the folder, else that on the Hub, with our part of it renewed."""
    named = report["recipe"]["model"].partition("@")[0]
    base = base_model or (named if named and not Path(named).expanduser().exists() and named.count("/") == 1 else None)
    evaluation = report.get("evaluation", {})
    results = list(_results(repo_id, evaluation))
    parts = Environment(loader=PackageLoader("llmprune.report", "."), trim_blocks=True, keep_trailing_newline=False)
    source = (report.get("calibration") or {}).get("source", "")
    block = parts.get_template("card_block.md").render(
        report=report, steps=words.steps(report), amount=words.amount, base=base, repo=repo_id, begin=BEGIN, end=END,
        calibration=_without_folder(source), results=[row for row, _ in results],
    )  # fmt: skip
    existing = _existing(folder, repo_id, revision, api)
    data: Any = existing.data if existing is not None else ModelCardData()
    _update(data, base, license or data.license or _inherited_license(folder, named, base, api), report)
    kept = [one for one in data.eval_results or [] if one.source_name != SOURCE]
    data.eval_results = kept + [one for _, one in results] or None
    if data.eval_results:
        data.model_name = data.model_name or repo_id.rpartition("/")[2]
    if existing is None:
        text = parts.get_template("card.md").render(
            card_data=data.to_yaml(), name=repo_id.rpartition("/")[2], block=block
        )
        return ModelCard(text + "\n")
    before, found, rest = existing.text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    # a card without our part gets it at the end
    existing.text = before + block + after if found else f"{before.rstrip()}\n\n{block}\n"
    return existing


def _existing(folder: Path, repo_id: str, revision: str | None, api: HfApi | None) -> ModelCard | None:
    """The card that people may have edited: that of the folder, else that of the repository."""
    if (folder / CARD).is_file():
        return ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    text = _remote_card(repo_id, revision, api)
    return None if text is None else ModelCard(text, ignore_metadata_errors=True)


def _remote_card(repo_id: str, revision: str | None, api: HfApi | None) -> str | None:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if api is None:
        return None
    try:
        return Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
    except (EntryNotFoundError, RepositoryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None


def _update(data: Any, base: str | None, license: str | None, report: dict[str, Any]) -> None:
    """Our metadata, where nobody has written other; tags are added to those that are there."""
    data.base_model = data.base_model or base
    data.license = license
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    steps = words.steps(report)
    ours = ["llmprune", "pruned", *(recipe["method"] for recipe in steps)]
    ours += [f"{recipe['pattern']}-sparsity" for recipe in steps if recipe["pattern"] != "unstructured"]
    data.tags = list(dict.fromkeys([*(data.tags or []), *ours]))


def _inherited_license(folder: Path, named: str, base: str | None, api: HfApi | None) -> str | None:
    """The licence that the dense model's card names."""
    local = Path(named).expanduser() / CARD
    text = local.read_text(encoding="utf-8") if named and local.is_file() else None
    if text is None and base is not None:
        text = _remote_card(base, None, api)
    data: Any = ModelCard(text, ignore_metadata_errors=True).data if text else None
    return None if data is None else data.license


def _results(repo_id: str, evaluation: dict[str, Any]) -> Any:
    """Rows of the card's table, each with the entry for the metadata."""
    dense = evaluation.get("baseline", {})
    for spec, row in evaluation.get("perplexity", {}).items():
        name = _without_folder(spec)
        protocol = f"{row['tokens']:,} tokens, windows of {row['seqlen']}, stride {row['stride']}, {row['dtype']}"
        other = dense.get("perplexity", {}).get(spec)
        table = {
            "what": f"perplexity, {name}",
            "value": f"{row['ppl']:.3f}",
            "dense": f"{other['ppl']:.3f}" if other else "–",
        }
        yield {**table, "protocol": protocol}, _entry(repo_id, name, "perplexity", row["ppl"], protocol)
    for name, row in evaluation.get("tasks", {}).items():
        protocol = f"lm-eval, {row['fewshot']}-shot, {row['n']} rows"
        for metric, error in row["stderr"].items():
            if not isinstance(row.get(metric), float):
                continue
            spread = f" ± {error:.4f}" if error is not None else ""
            other = dense.get("tasks", {}).get(name)
            table = {
                "what": f"{metric}, {name}",
                "value": f"{row[metric]:.4f}{spread}",
                "dense": f"{other[metric]:.4f}" if other else "–",
            }
            yield {**table, "protocol": protocol}, _entry(repo_id, name, metric, row[metric], protocol)


def _entry(repo_id: str, dataset: str, metric: str, value: float, protocol: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type=metric,
        metric_value=value, metric_name=f"{metric} ({protocol})", source_name=SOURCE,
        source_url=f"https://huggingface.co/{repo_id}",
    )  # fmt: skip


def _without_folder(spec: str) -> str:
    """A text SPEC without the folders of this machine."""
    kind, colon, rest = spec.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "file" and colon else spec


def _understood(repo_id: str, error: HfHubHTTPError) -> UserError | RunError:
    """The Hub's refusal in our terms; its text never holds the token."""
    status = error.response.status_code if error.response is not None else 0
    reason = str(error).strip().splitlines()[-1]
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"the Hub refuses to write to {repo_id} ({status}): {reason}. Log in with `hf auth login` or set HF_TOKEN "
            "to a token that may write there"
        )
    if 400 <= status < 500:
        return UserError(f"the Hub refuses the upload to {repo_id} ({status}): {reason}")
    return RunError(f"the Hub failed ({status}): {reason}. Repeat the command: what is there is kept")
